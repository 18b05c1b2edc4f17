"""A run, from its options to the saved adapter.

`finetuning` is the story, `reading` and `setup` its cheap half and the load, `loop` and `step` the work, `resume` the
one module that asks whether a run is fresh. `job` is a run before its base is loaded, `state` what changes from step to
step, `progress` shows it, `trackers` send its figures, `checkpointing` and `saving` write what is kept of it.

`budget` is how a run keeps to its time, `search` finds its learning rate, `estimating` says what it will take, `report`
what it did, and `reproduction` makes it again.
"""

import time
from typing import TYPE_CHECKING

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.importing import importing

if TYPE_CHECKING:
    from lora_alpaca.artifacts.run_record import RunResult
    from lora_alpaca.training.reading import RunRows


def finetune(config: FinetuneConfig) -> "RunResult":
    """Train a LoRA adapter and return the result; `config.output_dir` then holds the adapter, self-describing.

    Reads the data, holds out a validation split, trains with AdamW, validates and writes checkpoints at intervals,
    and keeps the adapter with the best validation loss. On one CPU, one config gives bit-identical adapters.
    The time of --max_minutes begins with the call. For --export_dir time is kept, for a call of `export_hf` afterwards.
    Raises the children of LoraAlpacaError, and those about options, folders and data before a model is loaded.
    """
    return _finetune(config, time.perf_counter())


def command(config: FinetuneConfig) -> "RunResult":
    """Do what `finetune` does as a command, whose time begins with its process."""
    from lora_alpaca.planning.budget import process_start

    return _finetune(config, process_start())


def _finetune(config: FinetuneConfig, begun: float) -> "RunResult":
    rows = _read_early(config)
    from lora_alpaca.planning.budget import Budget, Meter

    with importing():
        from lora_alpaca.training.finetuning import train

    return train(config, rows, meter=Meter(Budget.of(config), begun))


def _read_early(config: FinetuneConfig) -> "RunRows | None":
    """Return the rows, read before torch is imported, so that a mistake in a file is answered in a second.

    None where which rows they are is decided later.
    """
    from lora_alpaca.prompts import load_template
    from lora_alpaca.training.reading import read_rows

    if config.prompt_template_name:
        load_template(config.prompt_template_name)
    if config.resume or not config.data_path:
        return None
    return read_rows(config)
