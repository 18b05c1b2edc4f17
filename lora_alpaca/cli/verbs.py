"""The commands: each has a config, which its flags fill, and the function that does the work; an error is one line."""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from lora_alpaca.cli.flags import parse
from lora_alpaca.cli.help import help_text, overview
from lora_alpaca.config import ConvertConfig, ExportConfig, FinetuneConfig, GenerateConfig, ShowConfig
from lora_alpaca.config.environment import check_libraries
from lora_alpaca.config.options import Options
from lora_alpaca.errors import ConfigError, LoraAlpacaError
from lora_alpaca.signals import Interrupted, Stop


class Verb(NamedTuple):
    """A command: its options, and `module:function`, which is imported when the options are known to be good."""

    config: type[Options]
    function: str

    def __call__(self, config: Options) -> None:
        module, _, name = self.function.partition(":")
        getattr(import_module(f"lora_alpaca.{module}"), name)(config)


VERBS = {
    "finetune": Verb(FinetuneConfig, "training:finetune"),
    "generate": Verb(GenerateConfig, "inference.terminal:generate"),
    "export": Verb(ExportConfig, "export.huggingface:export_hf"),
    "show": Verb(ShowConfig, "data.visualization:show"),
    "convert_adapter": Verb(ConvertConfig, "export.convert_adapter:convert_adapter"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `VERB --flag value ...` and exit: 0 done, 1 failed, 2 wrong words, 128 + n after signal n (130: Ctrl-C)."""
    words = list(sys.argv[1:] if argv is None else argv)
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    try:
        with Stop().watching():
            _run(words)
        sys.exit(0)
    except LoraAlpacaError as error:
        print(f"error: {rank}{' '.join(str(error).splitlines())}", file=sys.stderr)  # one line, whatever is in it
        _exit(error.exit_code)
    except Interrupted as stop:
        print(f"{rank}stopped by {stop.signal}: {stop}", file=sys.stderr)
        _exit(stop.exit_code)


def _exit(exit_code: int) -> NoReturn:
    """Exit; a worker of torchrun at once, for tearing down what it shared with ranks that have ended takes seconds."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _run(words: list[str]) -> None:
    """Run the command that the words name; the heavy imports begin when its config is known to be good."""
    if not words or words[0] in ("-h", "--help"):
        return print(overview({name: verb.config for name, verb in VERBS.items()}))
    if words[0] == "--version":
        from lora_alpaca._version import __version__

        return print(__version__)
    name, flags = words[0], words[1:]
    if name not in VERBS:
        raise ConfigError(f"unknown command {name}; {_nearest(name, VERBS) or 'one of ' + ', '.join(VERBS)}")
    verb = VERBS[name]
    if {"-h", "--help"} & set(flags):
        return print(help_text(verb.config))
    config = parse(verb.config, flags)
    check_libraries()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks is not the user's to solve
    verb(config)


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else ""
