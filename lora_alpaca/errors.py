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
    └── ExportError      (RuntimeError)     a merge that would not answer as base + adapter does

A message is one line: what is wrong, where (`file:row` or `--flag`) and what to do. The command line prints it as
`error: ...` and exits with `exit_code`: 2 for wrong input, 1 for what happened while working.
"""


class LoraAlpacaError(Exception):
    """The base of every error raised on purpose by this library."""

    exit_code = 1


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
