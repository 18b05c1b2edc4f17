"""The end of a run: its adapter, with tokenizer, prompt contract and record, saved whole."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import adapter_folder, prompt_contract
from lora_alpaca.artifacts.adapter_folder import TrainedAdapter
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.errors import TrainingError
from lora_alpaca.models.trainable import State, Trainable
from lora_alpaca.training.job import Job


def save_adapter(trainable: Trainable, state: State, job: Job, record: dict[str, Any], result: RunResult) -> None:
    """Save an adapter in the output folder of its run, or, where that cannot be written to, in a temporary folder.

    A disk that another process fills in the last second then costs no run. Raises TrainingError naming that folder.
    """
    generation = trainable.model.generation_config
    stop_ids = prompt_contract.stop_ids(generation.eos_token_id, job.tokenizer, job.template)
    contract = prompt_contract.build(job.tokenizer, job.template, stop_ids, job.train)
    adapter = TrainedAdapter(state, trainable.config(), job.base, job.tokenizer, job.template, contract, record)
    try:
        adapter_folder.save(result.output_dir, adapter, result)
    except OSError as error:
        what = f"--output_dir {result.output_dir}: the adapter could not be saved there ({error.strerror or error})"
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="lora-alpaca-"))
            adapter_folder.save(elsewhere, adapter, replace(result, output_dir=elsewhere))
        except OSError:
            raise TrainingError(
                f"{what}, nor where temporary files are; free space, and --resume goes on from the last checkpoint"
            ) from None
        raise TrainingError(f"{what}; it is complete in {elsewhere}: free space and move it") from None
