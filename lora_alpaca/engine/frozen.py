"""A frozen quantised layer that computes with its weights in the compute dtype, made when needed and not kept.

The backward of a frozen layer is a product with the same weights, so nothing of their size outlives a call.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lora_alpaca import quantization
from lora_alpaca.quantization import FrozenWeight


class FrozenLinear(torch.autograd.Function):
    """`x` [..., in] times the weights of a quantised layer: [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
        """Return the product. A scale of whole rows commutes with it, and is cheaper on the few outputs."""
        ctx.weight = weight
        y = F.linear(x, weight.matrix(x.dtype))  # [..., out]
        return y if weight.scale is None else y.mul_(weight.scale)

    @staticmethod
    def backward(ctx: Any, by_y: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient by `x`."""
        weight = ctx.weight
        if weight.scale is not None:
            by_y = (by_y * weight.scale).to(by_y.dtype)
        return by_y @ weight.matrix(by_y.dtype), None


def frozen_forward(module: torch.nn.Module, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a forward for a quantised layer that computes in `dtype`, or None for any other module."""
    weight = quantization.frozen_weight(module)
    if weight is None:
        return None
    bias = None if module.bias is None else module.bias.to(dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = FrozenLinear.apply(x.to(dtype), weight)
        return y if bias is None else y + bias

    return forward
