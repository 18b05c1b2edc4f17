"""A frozen 8-bit layer that computes with its weights in the compute dtype, made at every use and not kept.

The backward of a frozen layer is a product with the same weights, so nothing of their size outlives a call.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lora_alpaca.models import quantization
from lora_alpaca.models.quantised_linear import EightBitLinear


class Int8Linear(torch.autograd.Function):
    """`x` [..., in] times int8 weights [out, in] whose rows have a scale [out]: [..., out].

    The scale of a row commutes with the product. On the outputs it is cheaper, and rounds less, than on the weights;
    but in fp16 a product of unscaled weights overflows, and a gradient that is scaled before its product underflows.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the product in the dtype of `x`."""
        ctx.save_for_backward(weight, scale)
        if x.dtype == torch.float16:
            return F.linear(x, _scaled_weight(weight, scale, x.dtype))
        return _scale(F.linear(x, weight.to(x.dtype)), scale)

    @staticmethod
    def backward(ctx: Any, by_y: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient by `x`."""
        weight, scale = ctx.saved_tensors
        if by_y.dtype == torch.float16:
            return by_y @ _scaled_weight(weight, scale, by_y.dtype), None, None
        return _scale(by_y.clone(memory_format=torch.contiguous_format), scale) @ weight.to(by_y.dtype), None, None


def _scaled_weight(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return int8 weights [out, in] times fp32 numbers [out], rounded once; on CUDA one kernel without an fp32 copy."""
    return torch.mul(weight, scale[:, None], out=torch.empty_like(weight, dtype=dtype))


def _scale(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply the columns of `y` [..., out] by fp32 numbers [out], in place, and return it.

    On a CPU a few rows at a time: torch makes fp32 copies of what it multiplies, and these stay in the cache.
    """
    for rows in y.view(-1, y.shape[-1]).split(64) if y.device.type == "cpu" else [y]:
        rows.mul_(scale)
    return y


def int8_forward(module: Any, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a forward for an 8-bit layer that computes in `dtype`, or None for any other module.

    What comes in fp64 is computed in fp64: it is a reference.
    """
    stored = quantization.eight_bit_weight(module)
    if stored is None:
        return None
    kept = None if isinstance(module, EightBitLinear) else stored  # whose weights may be sharded between two calls

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x if x.dtype == torch.float64 else x.to(dtype)
        weight, scale = kept or (module.weight, module.scale)
        y: torch.Tensor = Int8Linear.apply(x, weight, scale)
        return y if module.bias is None else y + module.bias.to(dtype)

    return forward
