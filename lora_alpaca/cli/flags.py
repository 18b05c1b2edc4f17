"""Words of a command line to a config."""

from collections.abc import Mapping, Sequence
from typing import TypeVar, get_args

from lora_alpaca.cli.help import type_name
from lora_alpaca.config.options import Options
from lora_alpaca.errors import ConfigError

Config = TypeVar("Config", bound=Options)


def parse(
    config_class: type[Config], argv: Sequence[str], commands: Mapping[str, type[Options]] | None = None
) -> Config:
    """Return the config that the words of a command line make; ConfigError for any word that does not belong.

    A flag that only another one of the `commands` has is named as such.
    """
    import fire  # a fifth of the time of --help, which has nothing to parse
    from fire.decorators import SetParseFn

    @SetParseFn(str)
    def build(**flags: str) -> dict[str, str]:
        return flags

    flags = fire.Fire(build, command=_joined(config_class, argv, commands or {}), serialize=lambda _: None)
    return config_class(**flags)


def _joined(config_class: type[Options], argv: Sequence[str], commands: Mapping[str, type[Options]]) -> list[str]:
    """Return the words as `--name=value`, the one form that fire cannot misread, having refused all others."""
    words, given = list(argv), {}
    positional = list(config_class.positional)
    unvalued, last = [], ""
    while words:
        word = words.pop(0)
        if positional and not word.startswith("-"):
            word = f"--{positional.pop(0)}={word}"
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"stray word {word!r}; {_way(config_class, last)}")
        dashed, equals, value = word[2:].partition("=")
        last = name = dashed.replace("-", "_")
        if name in given:
            raise ConfigError(f"--{name} is given twice; once is enough")
        is_known = name in config_class.model_fields
        if not equals:
            bare = not words or words[0].startswith("--")
            unvalued += [name] * (bare and is_known and not _is_switch(config_class, name))
            value = "True" if bare else words.pop(0)
        while not is_known and words and not words[0].startswith("--"):
            value += f" {words.pop(0)}"  # of a flag of another trainer, which may take several
        given[name] = value
    if given.keys() - config_class.model_fields.keys():
        raise ConfigError(config_class.unknown(given, commands))
    for name in unvalued:
        raise ConfigError(f"--{name} needs a value: --{name} {type_name(config_class, name)}")
    return [f"--{name}={value}" for name, value in given.items()]


def _way(config_class: type[Options], last: str) -> str:
    """Return how the options of a command are written, that of the last one if it is a list."""
    if last in config_class.model_fields and type_name(config_class, last) == "NAMES":
        return f"a list has commas: --{last} NAME,NAME"
    return "every option is --name value"


def _is_switch(config_class: type[Options], name: str) -> bool:
    annotation = config_class.model_fields[name].annotation
    return annotation is bool or bool in get_args(annotation)
