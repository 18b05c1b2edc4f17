"""Words of a command line to a config."""

from collections.abc import Sequence
from typing import TypeVar, get_args

from lora_alpaca.cli.help import type_name
from lora_alpaca.config.options import Options
from lora_alpaca.errors import ConfigError

Config = TypeVar("Config", bound=Options)


def parse(config_class: type[Config], argv: Sequence[str]) -> Config:
    """Return the config that the words of a command line make; ConfigError for any word that does not belong."""
    import fire  # a fifth of the time of --help, which has nothing to parse
    from fire.decorators import SetParseFn

    @SetParseFn(str)
    def build(**flags: str) -> dict[str, str]:
        return flags

    flags = fire.Fire(build, command=_joined(config_class, argv), serialize=lambda _: None)
    return config_class(**flags)


def _joined(config_class: type[Options], argv: Sequence[str]) -> list[str]:
    """Return the words as `--name=value`, the one form that fire cannot misread, having refused all others."""
    words, joined, seen = list(argv), [], set()
    positional = list(config_class.positional)
    while words:
        word = words.pop(0)
        if positional and not word.startswith("-"):
            word = f"--{positional.pop(0)}={word}"
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"stray word {word!r}; every option is --name value")
        dashed, equals, value = word[2:].partition("=")
        name = dashed.replace("-", "_")
        if name not in config_class.model_fields:
            raise ConfigError(config_class.unknown(dashed))
        if name in seen:
            raise ConfigError(f"--{name} is given twice; once is enough")
        seen.add(name)
        if not equals:
            bare = not words or words[0].startswith("--")
            if bare and not _is_switch(config_class, name):
                raise ConfigError(f"--{name} needs a value: --{name} {type_name(config_class, name)}")
            value = "True" if bare else words.pop(0)
        joined.append(f"--{name}={value}")
    return joined


def _is_switch(config_class: type[Options], name: str) -> bool:
    annotation = config_class.model_fields[name].annotation
    return annotation is bool or bool in get_args(annotation)
