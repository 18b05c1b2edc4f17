"""A run, from its options to the saved adapter.

`finetuning` is the story, `reading` and `setup` its cheap half and the load, `loop` and `step` the work, `resume` the
one module that asks whether a run is fresh. `job` is a run before its base is loaded, `state` what changes from step to
step, `progress` shows it, `trackers` send its figures, `saving` writes the adapter.
"""

from typing import TYPE_CHECKING

from lora_alpaca.config import FinetuneConfig

if TYPE_CHECKING:
    from lora_alpaca.artifacts.run_record import RunResult
    from lora_alpaca.training.reading import RunRows


def finetune(config: FinetuneConfig) -> "RunResult":
    """Train a LoRA adapter and return the result; `config.output_dir` then holds the adapter, self-describing.

    Reads the data, holds out a validation split, trains with AdamW, validates and writes checkpoints at intervals,
    and keeps the adapter with the best validation loss. On one CPU, one config gives bit-identical adapters.
    Raises the children of LoraAlpacaError, and those about options, folders and data before a model is loaded.
    """
    rows = _read_early(config)
    from lora_alpaca.training.finetuning import train

    return train(config, rows)


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
