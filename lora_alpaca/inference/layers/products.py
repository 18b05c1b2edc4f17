"""Quantised layers on a CPU: products that take the weights as they are stored, and the activations as they come.

bitsandbytes rounds the activations of an 8-bit layer to 8 bits, too, and dequantises a 4-bit layer at every use.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F

from lora_alpaca.inference.layers import kernels
from lora_alpaca.inference.layers.weights import OtherWeights, Weights
from lora_alpaca.models import quantization

MOST = 8  # tokens at a time; for more the weights are dequantised, and the products large
Forward = Callable[[torch.Tensor], torch.Tensor]


def put_in(model: Any, functions: kernels.Functions) -> None:
    """Replace the forward of the quantised layers of a model."""
    for layer in model.modules():
        plain = _eight_bits(layer) or (layer.forward if quantization.four_bit_parts(layer) is not None else None)
        if plain is not None:
            layer.forward = FewTokens(layer, plain, functions)


class FewTokens:
    """The forward of a layer, by the compiled functions for few tokens, once these are there."""

    def __init__(self, layer: Any, plain: Forward, functions: kernels.Functions):
        self.plain, self.functions, self._weights = plain, functions, Weights()
        self.linear: kernels.Linear | None = None
        with suppress(OtherWeights):
            self.linear = self._weights.linear(layer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.numel() // x.shape[-1]
        functions = self.functions.ready() if tokens <= MOST else None
        if functions is None or self.linear is None:
            return self.plain(x)
        values, threads, weight = x.to(torch.float32).contiguous(), torch.get_num_threads(), self.linear.weight
        memory, y = torch.empty(tokens * threads * weight.columns), torch.empty(tokens, weight.rows)
        functions.multiply(
            ctypes.byref(self.linear),
            ctypes.c_void_p(values.data_ptr()),
            ctypes.c_int64(tokens),
            ctypes.c_int64(threads),
            ctypes.c_void_p(memory.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
        )
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def _eight_bits(layer: Any) -> Forward | None:
    """Return a forward for an 8-bit layer that multiplies with its weights in the dtype of the input."""
    stored = quantization.eight_bit_weight(layer)
    if stored is None:
        return None
    weight, scale = stored

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, weight.to(x.dtype)).mul_(scale)  # fp32 numbers, rounded once
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    return forward
