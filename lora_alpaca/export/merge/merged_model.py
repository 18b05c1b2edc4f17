"""A merged model before it is written: its tensors, made when they are read, and what became of each."""

from dataclasses import dataclass

import torch

from lora_alpaca.errors import ConfigError
from lora_alpaca.export.job import Job
from lora_alpaca.export.merge.loaded_deltas import LoadedDeltas, open_deltas
from lora_alpaca.export.merge.merged_tensors import MergedTensors
from lora_alpaca.export.merge.quantised_values import QuantisedValues
from lora_alpaca.export.tensors import Tensors
from lora_alpaca.models.base import weight_files
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.shards import Shards
from lora_alpaca.models.tensor_names import TensorNames


@dataclass(frozen=True)
class MergedModel:
    """The tensors of a merged model, and the base they are made of.

    `exact` are the same tensors in fp32, not rounded. `vocabulary` is the number of tokens if it is another one than
    the base's, `tokens` are those whose embeddings were trained by themselves. `values` are the base's tensors as
    training held them, if that was in 8 or 4 bits.
    """

    base_tensors: Tensors
    tensors: MergedTensors
    exact: Tensors
    tied: bool
    base_tied: bool
    vocabulary: int | None
    tokens: list[int]
    values: Tensors | None
    notes: list[str]
    memory: str


def open_model(job: Job) -> MergedModel:
    """Return the merged model of a job. Raises what `Deltas` and `LoadedDeltas` raise."""
    base = job.source.base
    tensors = Shards(weight_files(base))
    bare = meta_model(base)
    base_tied = bool(bare is not None and bare.config.get_text_config().tie_word_embeddings)
    values = _values(job, tensors, bare)
    chosen = _chosen(job, values) or tensors
    dtype = job.dtype if job.config.dtype != "auto" or chosen is values else None
    deltas = open_deltas(job.adapters, base, tensors.infos)
    if chosen is not tensors and isinstance(deltas, LoadedDeltas):
        raise ConfigError("--merge_into quantised_values: not for a base that has to be loaded whole")
    return MergedModel(
        tensors,
        MergedTensors(chosen, deltas, dtype),
        MergedTensors(chosen, deltas, torch.float32),
        deltas.tied,
        base_tied,
        deltas.vocabulary,
        deltas.tokens,
        values,
        deltas.notes,
        f"{'the whole model' if isinstance(deltas, LoadedDeltas) else 'a tensor at a time'} is held in memory",
    )


def _values(job: Job, tensors: Tensors, bare: object) -> Tensors | None:
    """Return the tensors of the base as training held them, None if that was as they are stored, or is not known."""
    if job.held is None or bare is None:
        return None
    names = TensorNames(bare, {name: info.shape for name, info in tensors.infos.items()})
    return None if names.converted else QuantisedValues(tensors, bare, names.stored, job.held)


def _chosen(job: Job, values: Tensors | None) -> Tensors | None:
    """Return the tensors to merge into, None for the base's own. Raises ConfigError where there are no others."""
    if job.config.merge_into == "full_precision":
        return None
    if values is None:
        raise ConfigError(
            f"--merge_into quantised_values: {job.adapters[0][0]} records no base in 8 or 4 bits; leave the flag out"
        )
    return values
