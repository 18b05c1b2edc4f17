"""The commands: each has a config, which its flags fill, and the function that does the work; an error is one line."""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from lora_alpaca.cli.flags import parse
from lora_alpaca.cli.help import help_text, overview
from lora_alpaca.cli.launching import end_with_launcher, launch, processes
from lora_alpaca.cli.streams import BROKEN_PIPE, OutputError, usable_streams
from lora_alpaca.config import (
    CompareConfig,
    ConvertBaseConfig,
    ConvertConfig,
    EstimateConfig,
    EvaluateConfig,
    ExportConfig,
    FindConfig,
    FinetuneConfig,
    GenerateConfig,
    ImportMetaConfig,
    ReportConfig,
    ReproduceConfig,
    SelftestConfig,
    ShowConfig,
    VerifyConfig,
    WeightDiffConfig,
)
from lora_alpaca.config.environment import check_libraries, require_folder
from lora_alpaca.config.importing import importing, leave_garbage_at_exit
from lora_alpaca.config.options import Options
from lora_alpaca.errors import ConfigError, LoraAlpacaError, visible
from lora_alpaca.signals import Interrupted, Stop


class Verb(NamedTuple):
    """A command: its options, and `module:function`, which is imported when the options are known to be good.

    `makes_folder` is false for those whose product is what they print.
    """

    config: type[Options]
    function: str
    makes_folder: bool = True

    def __call__(self, config: Options) -> None:
        module, _, name = self.function.partition(":")
        with importing():
            function = getattr(import_module(f"lora_alpaca.{module}"), name)
        function(config)


VERBS = {
    "finetune": Verb(FinetuneConfig, "training:command"),
    "estimate": Verb(EstimateConfig, "training.estimating.estimating:estimate", makes_folder=False),
    "find_lr": Verb(FindConfig, "training.search.finding:find_lr"),
    "generate": Verb(GenerateConfig, "inference.terminal:generate", makes_folder=False),
    "evaluate": Verb(EvaluateConfig, "evaluation.evaluating:evaluate"),
    "export": Verb(ExportConfig, "export.exporting:export_hf"),
    "verify": Verb(VerifyConfig, "export.verify.verification:verify", makes_folder=False),
    "selftest": Verb(SelftestConfig, "selftest.testing:selftest", makes_folder=False),
    "show": Verb(ShowConfig, "data.visualization:show", makes_folder=False),
    "report": Verb(ReportConfig, "training.report.redrawing:report"),
    "reproduce": Verb(ReproduceConfig, "training.reproduction.reproducing:reproduce"),
    "compare": Verb(CompareConfig, "training.report.comparing:compare", makes_folder=False),
    "convert_adapter": Verb(ConvertConfig, "export.imports.convert_adapter:convert_adapter"),
    "convert_base": Verb(ConvertBaseConfig, "export.imports.convert_base:convert_base"),
    "import_meta": Verb(ImportMetaConfig, "export.imports.import_meta:import_meta"),
    "weight_diff": Verb(WeightDiffConfig, "export.weight_diff:weight_diff"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `VERB --flag value ...` and exit: 0 done, 1 failed, 2 wrong words, 128 + n after signal n (130: Ctrl-C).

    What a command prints may be read by nobody; one that prints its product then ends with 141, as after SIGPIPE.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    end_with_launcher()
    leave_garbage_at_exit()
    verb = VERBS.get(words[0]) if words else None
    try:
        with usable_streams(goes_on=verb is not None and verb.makes_folder and not _asks_for_help(words)):
            exit_code = _exit_code(words)
    except OutputError as error:  # at the very end
        exit_code = _told(error)
    _exit(exit_code)


def _exit_code(words: list[str]) -> int:
    """Run the command that the words name, and return the exit code, having printed the one line of an error."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    try:
        with Stop().watching():
            return _run(words)
    except LoraAlpacaError as error:
        print(f"error: {rank}{' '.join(str(error).splitlines())}", file=sys.stderr)  # one line, whatever is in it
        return error.exit_code
    except Interrupted as stop:
        print(f"{rank}stopped by {stop.signal}: {visible(str(stop))}", file=sys.stderr)
        return stop.exit_code
    except OutputError as error:
        return _told(error)
    except OSError as error:  # of the disk or the system, where nobody expects one
        print(
            f"error: {rank}{visible(f'{error.filename}: ' * bool(error.filename))}{error.strerror or error}",
            file=sys.stderr,
        )
        return 1


def _told(error: OutputError) -> int:
    """Return the exit code of a command whose output is not taken; that its reader has left needs no telling."""
    if error.exit_code != BROKEN_PIPE:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _exit(exit_code: int) -> NoReturn:
    """Exit; a worker of torchrun at once, for tearing down what it shared with ranks that have ended takes seconds."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


def _run(words: list[str]) -> int:
    """Run the command that the words name, and return the exit code.

    The heavy imports begin when its config is known to be good.
    """
    if not words or words[0] in ("-h", "--help"):
        print(overview({name: verb.config for name, verb in VERBS.items()}))
        return 0
    if words[0] == "--version":
        from lora_alpaca._version import __version__

        print(__version__)
        return 0
    name, flags = words[0], words[1:]
    for word in words:
        if any("\udc80" <= letter <= "\udcff" for letter in word):  # bytes that are no text
            encoding = sys.getfilesystemencoding()
            hint = "rename it" if encoding == "utf-8" else "set LANG to a locale with UTF-8, such as C.UTF-8"
            raise ConfigError(f"{word!a}: not text in this terminal's encoding, {encoding}; {hint}")
    if name not in VERBS:
        raise ConfigError(f"unknown command {name}; {_nearest(name, VERBS) or 'one of ' + ', '.join(VERBS)}")
    verb = VERBS[name]
    if _asks_for_help(flags):
        print(help_text(verb.config))
        return 0
    require_folder()
    config = parse(verb.config, flags, {name: verb.config for name, verb in VERBS.items()})
    check_libraries()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its warning about forks is not the user's to solve
    if type(config) is FinetuneConfig and (number := processes(config)) > 1:
        return launch(words, config, number)
    verb(config)
    if type(config) is FinetuneConfig and config.export_dir and os.environ.get("RANK", "0") == "0":
        VERBS["export"](_export_of(config))
    return 0


def _export_of(config: FinetuneConfig) -> ExportConfig:
    """Return the options by which what a run has saved is exported into its --export_dir."""
    return ExportConfig(
        lora_weights=config.output_dir,
        output_dir=config.export_dir,
        trust_remote_code=config.trust_remote_code,
        overwrite=config.overwrite,
    )


def _asks_for_help(words: list[str]) -> bool:
    return bool({"-h", "--help"} & set(words))


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else ""
