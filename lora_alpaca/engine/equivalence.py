"""Compares rows in a pack with the same rows alone, on the user's own model and rows, before the first step."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from lora_alpaca.data.examples import Example, Examples
from lora_alpaca.engine.engines import Engine

TOLERANCES = {torch.float32: 1e-4}  # relative; dtypes that are not listed have 16 bits
ROUNDED = 0.1
Precision = Callable[[], AbstractContextManager[None]]  # a context in which a forward pass has the run's precision


def sample(examples: Sequence[Example], most: int = 4) -> list[Example]:
    """Return the longest row, where a short attention window would fail, and the shortest of the first few others."""
    lengths = examples.lengths if isinstance(examples, Examples) else np.array([len(row.ids) for row in examples])
    longest = int(lengths.argmax())
    others = [row for row in range(min(4 * most, len(lengths))) if row != longest]
    return [examples[row] for row in [longest, *sorted(others, key=lengths.__getitem__)][:most]]


def loss_and_gradient(
    engine: Engine, examples: Sequence[Example], precision: Precision
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of some examples, and its gradient by the whole adapter as one vector."""
    parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    total = torch.zeros((), device=engine.device)
    gradient = torch.zeros(sum(parameter.numel() for parameter in parameters), device=engine.device)
    for batch in engine.batches(examples):
        with precision():
            loss = engine.loss(batch)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradient += torch.cat([grad.flatten().float() for grad in found])
        total += loss.detach()
    return total, gradient


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest relative error among some tensors, NaN if one of them holds a NaN."""
    errors = [((one - other).norm() / other.norm()).item() for one, other in zip(found, expected, strict=True)]
    return next((error for error in errors if math.isnan(error)), max(errors))
