"""What an adapter does to one tensor of a base: it adds to it, takes its place, or has a rule of PEFT's own for it."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_alpaca.models.trainable import State

BLOCK = 2**20  # values held in fp32 at a time: they stay in the cache, and threads meet seldom enough on a busy machine


@dataclass(frozen=True)
class Product:
    """A change that is added: `scale * left @ right`, [rows, r] times [r, columns], fp32."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Sum:
    """A change that is added: `scale * delta`, fp32."""

    delta: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Rows:
    """Rows that were trained, and take the place of the base's."""

    numbers: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Whole:
    """A tensor that takes the place of the base's: it was trained whole, or is the base's, kept beside the adapter."""

    tensor: torch.Tensor
    trained: bool = True


@dataclass(frozen=True)
class Rule:
    """A change by the rule of a layer of PEFT, of one parameter of the layer of the base below it.

    `kind` is what the rule is called, `adds` whether it adds the same to every tensor.
    """

    layer: Any
    state: State
    parameter: str
    kind: str
    adds: bool

    @torch.no_grad()
    def merged(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what a tensor, fp32, becomes. Raises ValueError, as PEFT does, for NaN or infinity."""
        layer = copy.deepcopy(self.layer)  # which costs nothing on the meta device
        layer.load_state_dict(self.state, strict=False, assign=True)
        base = layer.get_base_layer()
        ones = {name: torch.ones(()).expand(other.shape) for name, other in base.named_parameters(recurse=False)}
        base.load_state_dict({**ones, self.parameter: tensor}, strict=False, assign=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if hasattr(layer, "unload_and_optionally_merge_module"):
                base = layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                layer.merge(safe_merge=True)
        merged: torch.Tensor = base.get_parameter(self.parameter).data
        return merged


Change = Product | Sum | Rows | Whole | Rule


class NotFinite(ValueError):
    """A merged tensor holds NaN or infinity."""


@torch.no_grad()
def merged(tensor: torch.Tensor, changes: Sequence[tuple[Change, float]], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor with changes, each times a weight, added in fp32, rounded once to a dtype.

    Raises NotFinite for NaN or infinity, ValueError or RuntimeError where a rule of PEFT's cannot be followed.
    """
    if changes and isinstance(whole := changes[0][0], Whole):
        tensor, changes = whole.tensor, changes[1:]
    rows = len(tensor)
    step = rows if any(isinstance(change, Rule) for change, _ in changes) else _rows_of_a_block(tensor)
    result, buffer = torch.empty(tensor.shape, dtype=dtype), torch.empty(step, *tensor.shape[1:])
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        values = buffer[: block.stop - start].copy_(tensor[block])
        for change, weight in changes:
            values = _apply(change, weight, values, block)
        low, high = result[block].copy_(values).aminmax()  # far cheaper than isfinite, and NaN stays NaN
        if not torch.isfinite(low) or not torch.isfinite(high):
            raise NotFinite("holds NaN or infinity")
    return result


def _rows_of_a_block(tensor: torch.Tensor) -> int:
    return max(1, BLOCK * len(tensor) // max(1, tensor.numel()))


def _apply(change: Change, weight: float, values: torch.Tensor, block: slice) -> torch.Tensor:
    """Return the values of some rows of a tensor with a change, which may be the same memory."""
    match change:
        case Product(left, right, scale):
            values.addmm_(left[block], right, alpha=weight * scale)
        case Sum(delta, scale):
            values.add_(delta[block], alpha=weight * scale)
        case Whole(tensor):
            values.copy_(tensor[block])
        case Rows(numbers, rows):
            here = (numbers >= block.start) & (numbers < block.stop)
            values[numbers[here] - block.start] = rows[here].float()
        case Rule():
            merged = change.merged(values)
            return merged if weight == 1 else values.lerp(merged, weight)
    return values
