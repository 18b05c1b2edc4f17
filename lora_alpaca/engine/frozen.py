"""A frozen 8-bit layer that computes with its weights in the compute dtype, made at every use and not kept.

The backward of a frozen layer is a product with the same weights, so nothing of their size outlives a call.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lora_alpaca import quantization


class FrozenLinear(torch.autograd.Function):
    """`x` [..., in] times int8 weights [out, in] whose rows have a scale [out]: [..., out].

    The scale of a row commutes with the product. On the outputs it is cheaper, and rounds less, than on the weights.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the product in the dtype of `x`."""
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, by_y: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient by `x`."""
        weight, scale = ctx.saved_tensors
        return (by_y * scale).to(by_y.dtype) @ weight.to(by_y.dtype), None, None


def frozen_forward(module: Any, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a forward for an 8-bit layer that computes in `dtype`, or None for any other module."""
    stored = quantization.eight_bit_weight(module)
    if stored is None:
        return None
    weight, scale = stored
    bias = None if module.bias is None else module.bias.to(dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = FrozenLinear.apply(x.to(dtype), weight, scale)
        return y if bias is None else y + bias

    return forward
