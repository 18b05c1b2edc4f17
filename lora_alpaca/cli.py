"""The command line: flags to a config, a verb to its function, an error to one line.

`fire` splits `--name=value`. What it is generous about is refused before it runs: unknown, misspelt, bare, repeated
and stray words. Every value stays a string until pydantic checks it, and nothing heavy is imported before all is well.
"""

import difflib
import importlib.util
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar, get_args

import fire
from fire.decorators import SetParseFn

from lora_alpaca.config import ConvertConfig, ExportConfig, FinetuneConfig, GenerateConfig, ShowConfig
from lora_alpaca.config.environment import check_libraries
from lora_alpaca.config.options import Options
from lora_alpaca.errors import ConfigError, LoraAlpacaError
from lora_alpaca.signals import Interrupted, Stop

Config = TypeVar("Config", bound=Options)

VERBS: dict[str, type[Options]] = {
    "finetune": FinetuneConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "show": ShowConfig,
    "convert_adapter": ConvertConfig,
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `VERB --flag value ...` and exit: 0 done, 1 failed, 2 said wrongly, 128 + n after signal n (130: Ctrl-C)."""
    words = list(sys.argv[1:] if argv is None else argv)
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    try:
        with Stop().watching():
            _answer(words)
        sys.exit(0)
    except LoraAlpacaError as error:
        print(f"error: {rank}{' '.join(str(error).splitlines())}", file=sys.stderr)  # one line, whatever is in it
        _leave(error.exit_code)
    except Interrupted as stop:
        print(f"{rank}stopped by {stop.signal}: {stop}", file=sys.stderr)
        _leave(stop.exit_code)


def _leave(exit_code: int) -> NoReturn:
    """Exit; a worker of torchrun at once, for tearing down what it shared with ranks that are gone takes seconds."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _answer(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        return print(_overview())
    if words[0] == "--version":
        from lora_alpaca import __version__

        return print(__version__)
    verb, flags = words[0], words[1:]
    if verb not in VERBS:
        raise ConfigError(f"unknown command {verb}; {_nearest(verb, VERBS) or 'one of ' + ', '.join(VERBS)}")
    if {"-h", "--help"} & set(flags):
        return print(help_text(VERBS[verb]))
    _run(parse(VERBS[verb], flags))


def _run(config: Options) -> None:
    """Hand a good config to the library function behind it; the heavy imports begin here."""
    check_libraries()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks is not the user's to solve
    if isinstance(config, FinetuneConfig):
        rows = _read_early(config)
        from lora_alpaca.training import finetune

        finetune(config, rows)
    elif isinstance(config, ShowConfig):
        from lora_alpaca.data.visualization import show

        show(config)
    elif isinstance(config, ConvertConfig):
        from lora_alpaca.converting import convert_adapter

        convert_adapter(config)
    elif isinstance(config, ExportConfig):
        from lora_alpaca.exporting import export_hf

        export_hf(config)
    elif isinstance(config, GenerateConfig):
        _generate(config)


def _read_early(config: FinetuneConfig) -> Any:
    """Return the rows, read before torch is imported, so that a mistake in a file is answered in a second.

    None where which rows they are is decided later.
    """
    from lora_alpaca.data import Rows
    from lora_alpaca.prompts import load_template

    if config.prompt_template_name:
        load_template(config.prompt_template_name)
    return (
        Rows(config.data_path, config.columns, config.skip_bad_rows) if config.data_path and not config.resume else None
    )


def _generate(config: GenerateConfig) -> None:
    """Answer once, chat in the terminal, or open the web page."""
    page = config.instruction is None and not config.chat
    if page and importlib.util.find_spec("gradio") is None:
        raise ConfigError('the web page needs gradio (pip install "lora-alpaca[web]"); or say --instruction or --chat')
    from lora_alpaca.generation import Generator

    generator = Generator.load(config)
    if config.instruction is not None:
        _print_stream(generator.stream(config.instruction, config.input))
    elif config.chat:
        print("One instruction a line; an empty line leaves.", file=sys.stderr)
        history: list[tuple[str, str]] = []  # of templates that take several turns
        while line := _read_line():
            answer = _print_stream(generator.stream(line, history=history))
            if generator.takes_turns:
                history.append((line, answer))
    else:
        from lora_alpaca.webui import launch

        launch(generator, config)


def _print_stream(pieces: Any) -> str:
    """Print an answer as it is made, and return it."""
    answer = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        answer += piece
    print()
    return answer


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


# ------------------------------------------------------------------------------------------------ words to config


def parse(config_class: type[Config], argv: Sequence[str]) -> Config:
    """Return the config that the words of a command line make; ConfigError for any word that does not belong."""

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
                raise ConfigError(f"--{name} needs a value: --{name} {_type_name(config_class, name)}")
            value = "True" if bare else words.pop(0)
        joined.append(f"--{name}={value}")
    return joined


def _is_switch(config_class: type[Options], name: str) -> bool:
    annotation = config_class.model_fields[name].annotation
    return annotation is bool or bool in get_args(annotation)


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else ""


# ------------------------------------------------------------------------------------------------------- help


def help_text(config_class: type[Options]) -> str:
    """Return the options of a command in their groups: flag, type, meaning, unit and default."""
    groups: dict[str, list[str]] = {}
    for name, field in config_class.model_fields.items():
        extra: Any = field.json_schema_extra
        default = extra["auto"] or _shown(field.default)
        facts = "; ".join(part for part in (extra["unit"] and f"in {extra['unit']}", f"default: {default}") if part)
        text = textwrap.fill(f"{field.description} [{facts}]", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
        groups.setdefault(extra["group"], []).append(f"  --{name} {_type_name(config_class, name)}\n{text}")
    title = (config_class.__doc__ or "").splitlines()[0]
    return "\n\n".join([title, *(f"{group}\n" + "\n".join(lines) for group, lines in groups.items())])


def _overview() -> str:
    rows = [f"  {verb:17}{(config.__doc__ or '').splitlines()[0]}" for verb, config in VERBS.items()]
    return "\n".join(["lora-alpaca COMMAND --flag value ...", "", *rows, "", "COMMAND --help lists its options."])


def _type_name(config_class: type[Options], name: str) -> str:
    """Return how a value of this option is written: TEXT, WHOLE, NUMBER, true|false, a choice, or NAMES."""
    annotation = config_class.model_fields[name].annotation
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    if list[str] in (annotation, *map(_core, kinds)):
        return "NAMES"
    if all(isinstance(kind, str) for kind in kinds):  # a Literal
        return "|".join(str(kind) for kind in kinds if kind)
    return {bool: "true|false", int: "WHOLE", float: "NUMBER", str: "TEXT"}.get(_core(kinds[0]), "TEXT")


def _core(kind: Any) -> Any:
    """Return the plain type inside `Annotated[type, ...]`."""
    return get_args(kind)[0] if hasattr(kind, "__metadata__") else kind


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return "none" if value in ("", None) else str(value)
