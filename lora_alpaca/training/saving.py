"""The end of a run: its adapter or model, with tokenizer, prompt contract and record, saved whole."""

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import adapter_folder, model_folder, prompt_contract
from lora_alpaca.artifacts.adapter_folder import TrainedAdapter
from lora_alpaca.artifacts.model_folder import TrainedModel
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.errors import TrainingError
from lora_alpaca.models.trainable import State, Trainable
from lora_alpaca.training.job import Job


def save_adapter(trainable: Trainable, state: State, job: Job, record: dict[str, Any], result: RunResult) -> None:
    """Save an adapter in the output folder of its run, or, where that cannot be written to, in a temporary folder.

    A disk that another process fills in the last second then costs no run. Raises TrainingError naming that folder.
    """
    _, contract = _contract(trainable, job)
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


def save_model(
    trainable: Trainable,
    tensors: Iterable[tuple[str, torch.Tensor]],
    job: Job,
    record: dict[str, Any],
    result: RunResult,
) -> None:
    """Save a model in the output folder of its run; `tensors` are those that learned, one after the other, on the CPU.

    Raises OSError: a model is too large to be put wherever temporary files are, which may be in memory.
    """
    stop_ids, contract = _contract(trainable, job)
    model = TrainedModel(trainable.names, job.base, job.tokenizer, job.template, stop_ids, contract, record)
    model_folder.save(result.output_dir, model, tensors, result)


def _contract(trainable: Trainable, job: Job) -> tuple[list[int], dict[str, Any]]:
    """Return the ids that end an answer, and the prompt contract."""
    generation = trainable.model.generation_config
    stop_ids = prompt_contract.stop_ids(generation.eos_token_id, job.tokenizer, job.template)
    return stop_ids, prompt_contract.build(job.tokenizer, job.template, stop_ids, job.train)
