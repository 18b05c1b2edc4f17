"""Words of a command line to a config."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from lora_alpaca.cli.help import type_name
from lora_alpaca.config import option_file
from lora_alpaca.config.option_file import FLAG, OptionFile
from lora_alpaca.config.options import Options
from lora_alpaca.errors import ConfigError

Config = TypeVar("Config", bound=Options)


def parse(
    config_class: type[Config], argv: Sequence[str], commands: Mapping[str, type[Options]] | None = None
) -> Config:
    """Return the config that the words of a command line make; ConfigError for any word that does not belong.

    Options of the file that --config names are as if they were among the words, which win over them. A flag that only
    another one of the `commands` has is named as such.
    """
    import fire  # a fifth of the time of --help, which has nothing to parse
    from fire.decorators import SetParseFn

    @SetParseFn(str)
    def build(**flags: str) -> dict[str, str]:
        return flags

    given, unvalued = _given(config_class, argv)
    if FLAG in unvalued:
        raise ConfigError(f"--{FLAG} needs a value: --{FLAG} FILE")
    is_named = FLAG in given and config_class.takes_file()
    file = option_file.read(given.pop(FLAG), config_class) if is_named else OptionFile("")
    options = {name: value for name, value in file.values.items() if name not in given}
    try:
        if (options | given).keys() - config_class.model_fields.keys():
            raise ConfigError(config_class.unknown(options | given, commands))
        for name in unvalued:
            raise ConfigError(f"--{name} needs a value: --{name} {type_name(config_class, name)}")
        words = [f"--{name}={value}" for name, value in given.items()]  # the one form that fire cannot misread
        return config_class(**options, **fire.Fire(build, command=words, serialize=lambda _: None))
    except ConfigError as error:
        raise ConfigError(file.located(str(error), options)) from None


def _given(config_class: type[Options], argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return name -> value of the words, and the names of those that lack one; any other word is an error."""
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
        is_known = name in config_class.model_fields or (name == FLAG and config_class.takes_file())
        if not equals:
            bare = not words or words[0].startswith("--")
            unvalued += [name] * (bare and is_known and not config_class.is_switch(name))
            value = "True" if bare else words.pop(0)
        while not is_known and words and not words[0].startswith("--"):
            value += f" {words.pop(0)}"  # of a flag of another trainer, which may take several
        given[name] = value
    return given, unvalued


def _way(config_class: type[Options], last: str) -> str:
    """Return how the options of a command are written, that of the last one if it is a list."""
    if last in config_class.model_fields and type_name(config_class, last) == "NAMES":
        return f"a list has commas: --{last} NAME,NAME"
    return "every option is --name value"
