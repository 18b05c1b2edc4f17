"""The errors a caller can catch. Each is also the standard library error that it specialises.

    LoraAlpacaError
    ├── ConfigError      (ValueError)       an option: unknown, out of range, or at odds with another one
    ├── DataError        (ValueError)       a data file or a row of it
    ├── TemplateError    (ValueError)       a prompt template
    ├── FolderError      (FileExistsError)  an output folder that may not be written to
    ├── ModelError       (RuntimeError)     a base model or tokenizer that does not load or does not fit
    ├── AdapterError     (RuntimeError)     a LoRA adapter that is missing, foreign or broken
    ├── ContractError    (RuntimeError)     a tokenizer or template that is not the one of training
    ├── CheckpointError  (RuntimeError)     a checkpoint that cannot be resumed from
    ├── TrainingError    (RuntimeError)     a step that cannot be taken, such as one with a loss of NaN
    ├── RankError        (RuntimeError)     another process of the run that failed, died or hangs
    ├── ExportError      (RuntimeError)     a merge that would not answer as base + adapter does
    ├── SelfTestError    (RuntimeError)     a check of the self-test that fails on this machine
    └── ReproductionError (RuntimeError)    a run that was made again and is another one

A message is one line: what is wrong, where (`file:row` or `--flag`) and what to do. The command line prints it as
`error: ...` and exits with `exit_code`: 2 for wrong input, 1 for what happened while working. What it quotes of
files and names is made `visible`.
"""

import re

LONGEST = 4000  # characters of a message
_CONTROL = re.compile(  # but newline and tab: C0, delete and C1; line ends, directions, surrogates and tags of Unicode
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Return a text whose control characters are written out, as in `\\x1b`, so that a terminal shows and obeys none.

    Newlines and tabs stay.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def first_line(error: BaseException | None) -> str:
    """Return the first line of what another library says, and the next ones as long as they end in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    last = next((number for number, line in enumerate(lines) if not line.endswith(":")), 0)
    return " ".join(lines[: last + 1]).removesuffix(".")


class LoraAlpacaError(Exception):
    """The base of every error raised on purpose by this library."""

    exit_code = 1

    def __str__(self) -> str:
        """Return the message in one line; what it quotes cannot control the terminal or log that it is written to.

        Of a quotation that is too long to be read, beginning and end are left.
        """
        line = visible(super().__str__()).replace("\n", "\\n")
        return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


class ConfigError(LoraAlpacaError, ValueError):
    """An option is unknown, misspelt, out of range, or at odds with another one."""

    exit_code = 2


class DataError(LoraAlpacaError, ValueError):
    """A data file cannot be read, or a row in it is not what it should be."""

    exit_code = 2


class TemplateError(LoraAlpacaError, ValueError):
    """A prompt template is unknown, malformed, or needed and not given."""

    exit_code = 2


class FolderError(LoraAlpacaError, FileExistsError):
    """An output folder holds something that must not be written over."""

    exit_code = 2


class ModelError(LoraAlpacaError, RuntimeError):
    """A base model or its tokenizer is missing, does not load, or lacks the asked modules."""


class AdapterError(LoraAlpacaError, RuntimeError):
    """A LoRA adapter is missing, belongs to another base, or is broken."""


class ContractError(LoraAlpacaError, RuntimeError):
    """A tokenizer or a prompt template gives other tokens than it gave in training."""


class CheckpointError(LoraAlpacaError, RuntimeError):
    """There are checkpoints, and none of them can be resumed from."""


class TrainingError(LoraAlpacaError, RuntimeError):
    """A training step cannot be taken."""


class RankError(LoraAlpacaError, RuntimeError):
    """Another process of the run failed: `rank` is its number, `cause` its message, or what is known of its end.

    `saved` is a sentence on what this process has saved.
    """

    def __init__(self, rank: int, cause: str, saved: str = ""):
        super().__init__(f"rank {rank} failed: {cause}" + (f"; {saved}" if saved else ""))
        self.rank, self.cause, self.saved = rank, cause, saved


class ExportError(LoraAlpacaError, RuntimeError):
    """A merged model would not answer as base + adapter does."""


class SelfTestError(LoraAlpacaError, RuntimeError):
    """Something that should change nothing changes a result on this machine."""


class ReproductionError(LoraAlpacaError, RuntimeError):
    """A run that was made again from its record gives another result."""
