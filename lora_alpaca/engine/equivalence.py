"""Compares rows in a pack with the same rows alone, on the user's own model and rows, before the first step."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lora_alpaca.data.examples import Example, Examples
from lora_alpaca.engine import patches, reference
from lora_alpaca.engine.engines import Engine, Packed
from lora_alpaca.engine.loss import piece_loss_in_place
from lora_alpaca.engine.model_access import is_sharded
from lora_alpaca.engine.pointwise import Pointwise
from lora_alpaca.engine.reference import Reference
from lora_alpaca.models import memory
from lora_alpaca.models.layers import library_model

EXACT = 1e-4  # the relative error of a gradient that is allowed in fp32
MARGIN = 10  # a limit is at least so many times what the reference's own rounding is
LARGEST = 0.01  # but in fp32 never more than this: a fault of 2 % is never taken for rounding
ROUNDINGS = 1  # the relative error that is allowed in 16 bits, in units in the last place
ROUNDED_MARGIN = 3  # and times what rows alone are off; right packs were up to 2.4 times, a fault of 5 % is 5 to 50
ROUNDED = 0.1  # what is allowed where a slice was compared in fp32, or rows alone are the same to the bit in any way
COUNTED = 128  # rows of which the cost of padding is counted
Precision = Callable[[], AbstractContextManager[None]]  # a context in which a forward pass has the run's precision
MOST_ENTRIES = 65_536  # of the gradient of one parameter that are compared
LossAndGradient = tuple[torch.Tensor, torch.Tensor]


def sample(examples: Sequence[Example], most: int = 4) -> list[Example]:
    """Return the longest row, where a short attention window would fail, and the shortest of the first few others."""
    lengths = examples.lengths if isinstance(examples, Examples) else np.array([len(row.ids) for row in examples])
    longest = int(lengths.argmax())
    others = [row for row in range(min(4 * most, len(lengths))) if row != longest]
    return [examples[row] for row in [longest, *sorted(others, key=lengths.__getitem__)][:most]]


def loss_and_gradient(
    engine: Engine, examples: Sequence[Example], precision: Precision = nullcontext
) -> LossAndGradient:
    """Return the loss of some examples, and its gradient by what learns as one vector, both summed in fp64.

    Of a large parameter, the vector has evenly spaced entries; of one that is sharded, those of this rank's part.
    """
    parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    total = torch.zeros((), dtype=torch.float64)
    parts = [torch.zeros(len(entries(parameter)), dtype=torch.float64) for parameter in parameters]
    for batch in engine.batches(examples):
        with precision():
            loss = engine.loss(batch)
        loss.backward()  # not autograd.grad: sharded gradients are summed by hooks of the backward pass
        for part, parameter in zip(parts, parameters, strict=True):
            if parameter.grad is not None:
                part += entries(parameter.grad).cpu()
                parameter.grad = None
        total += loss.detach().cpu()
    return total, torch.cat(parts)


def entries(tensor: torch.Tensor) -> torch.Tensor:
    """Return entries of a tensor, of this rank's part of one that is sharded, as a vector: all, unless it is large.

    Otherwise they are evenly spaced by an odd number, so that they are of all columns of a matrix.
    """
    own: Any = tensor
    flat: torch.Tensor = (own.to_local() if is_sharded(own) else own).detach().reshape(-1)
    return flat if len(flat) <= MOST_ENTRIES else flat[:: math.ceil(len(flat) / MOST_ENTRIES) | 1]


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest relative error among some tensors, NaN if one of them holds a NaN."""
    errors = [((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True)]
    return next((error for error in errors if math.isnan(error)), max(errors))


@dataclass(frozen=True)
class Comparison:
    """How far packs are off rows alone, and how far that may be; both relative, of loss and gradient."""

    error: float
    limit: float
    noise: float  # of rows alone, computed in another right way; 0 where it was not needed
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether the packs are right; NaN is not."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return (
            f"the gradient of a row in a pack is {self.error:.1e} off that of the row alone{self.where}, and "
            f"{self.limit:.1e} is allowed (rounding alone makes {self.noise:.1e})"
        )


def compare(
    packed: Engine,
    expected: LossAndGradient,
    again: Callable[[], LossAndGradient],
    rows: Sequence[Example],
    dtype: torch.dtype,
    precision: Precision = nullcontext,
    where: str = "",
    is_second: bool = False,
) -> Comparison:
    """Return how far packs of some rows, computed in `dtype`, are off what is expected.

    The limit grows with the model's own noise. That is how far rows alone, computed `again` in another right way, are
    off; it costs their time once more, and is computed only where the packs are not within the least limit. Where a
    slice has been compared in fp32 before, this comparison is the second, and as wide as rounding may be.
    """
    access, exact = packed.access, dtype == torch.float32
    error = access.largest(difference(loss_and_gradient(packed, rows, precision), expected))
    least = EXACT if exact else ROUNDED if is_second else ROUNDINGS * torch.finfo(dtype).eps
    if error <= least:
        return Comparison(error, least, 0.0, where)
    measured = access.largest(difference(again(), expected))
    if exact:
        limit = min(max(least, MARGIN * measured), LARGEST)
    else:
        limit = max(least, ROUNDED_MARGIN * measured) if measured else ROUNDED
    return Comparison(error, limit, measured, where)


def compare_slice(packed: Packed, alone: Reference, rows: Sequence[Example]) -> Comparison:
    """Return how far packs, computed in fp32, are off rows alone in fp64, on the first layers of a model in 16 bits.

    No layer of ours may be in the model. Raises what the model raises in these precisions, and MemoryShortage.
    """
    base = library_model(packed.model)
    with ExitStack() as stack:
        layers = stack.enter_context(reference.first_layers(base))
        _require_memory(packed, reference.bytes_in(base, torch.float32) + reference.bytes_in(base, torch.float64))
        stack.enter_context(reference.learning(base))
        stack.enter_context(reference.computing_in(base, torch.float32))
        stack.enter_context(patches.patched(base, torch.float32, Pointwise(), packed.access))
        plain = patches.has_plain_head(base, packed.access)
        packed = replace(packed, piece_loss=piece_loss_in_place if plain else None)
        with reference.computing_in(base, torch.float64):
            expected = loss_and_gradient(alone, rows)
        # gradients of sharded weights may be rounded to 16 bits once a batch; a pack is one
        together = replace(alone, micro_batch_size=len(rows)) if packed.access.in_lockstep else alone
        again = partial(loss_and_gradient, together, rows)
        stack.enter_context(patches.packed_attention(base))
        return compare(packed, expected, again, rows, torch.float32, where=f" in the first {layers} layers, in fp32")


def _require_memory(packed: Packed, needed: int) -> None:
    """Raise MemoryShortage where so many bytes are more than half of what is free, on any rank."""
    free, _ = memory.free_and_total(packed.device)
    free = int(-packed.access.largest(-free))
    if needed > free / 2:
        raise memory.MemoryShortage(f"{memory.gigabytes(needed)} are needed, {memory.gigabytes(free)} are free")


def cost_of_padding(packed: Engine, padded: Engine, examples: Sequence[Example]) -> float:
    """Return how many times the tokens of packs padded rows have, by the first rows."""
    rows = examples[:COUNTED]
    tokens = [sum(batch.input_ids.numel() for batch in engine.batches(rows)) for engine in (padded, packed)]
    return tokens[0] / max(1, tokens[1])
