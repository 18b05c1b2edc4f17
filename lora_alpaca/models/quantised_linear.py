"""Frozen linear layers in 8 and 4 bits whose weights are plain tensors, so that they can be spread over ranks.

They hold the numbers that bitsandbytes makes of a weight. PEFT takes them for linear layers, which they are.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Rows = Callable[[int, int], torch.Tensor]  # the rows of a weight [out, in] from one to another, in the compute dtype
Part = Callable[[torch.Tensor], tuple[torch.Tensor, int]]  # this rank's part of a parameter, and its first row


def placeholder(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """Return a frozen parameter that takes no memory: its entries are one number."""
    return torch.nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(shape), requires_grad=False)


class EightBitLinear(torch.nn.Linear):
    """A layer with an int8 `weight` [out, in] and fp32 `scale` [out] of its rows (LLM.int8)."""

    def __init__(self, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype, device: torch.device):
        super().__init__(in_features, out_features, has_bias, torch.device("meta"), dtype)
        self.weight = placeholder((out_features, in_features), torch.int8, device)
        self.scale = placeholder((out_features,), torch.float32, device)

    def fill(self, rows: Rows, part: Part) -> None:
        """Quantise this rank's rows of the weight; a row's numbers depend on that row alone."""
        from bitsandbytes.functional import int8_vectorwise_quant

        (own, first), (own_scale, _) = part(self.weight), part(self.scale)
        if len(own):
            values, largest, _ = int8_vectorwise_quant(rows(first, first + len(own)).half())
            own.copy_(values)
            own_scale.copy_(largest.float() / 127)

    def dequantised(self) -> torch.Tensor:
        """Return the weight, fp32 [out, in]."""
        return self.weight * self.scale[:, None]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product in the dtype of the input."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.dequantised().to(input.dtype), bias)


class FourBitLinear(torch.nn.Linear):
    """A layer whose `weight` [out * in / 2, 1] has two NF4 values a byte; `state` has the scales of its blocks."""

    def __init__(self, in_features: int, out_features: int, has_bias: bool, dtype: torch.dtype, device: torch.device):
        super().__init__(in_features, out_features, has_bias, torch.device("meta"), dtype)
        self.weight = placeholder(((in_features * out_features + 1) // 2, 1), torch.uint8, device)
        self.state: Any = None
        self.compute_dtype = dtype  # by this name PEFT asks for it, to round the adapter's first weights

    def fill(self, rows: Rows, part: Part) -> None:
        """Quantise the whole weight, as its scales depend on all of it, and keep this rank's part."""
        from bitsandbytes.functional import quantize_4bit

        whole = rows(0, self.out_features).contiguous()
        packed, self.state = quantize_4bit(whole, blocksize=64, compress_statistics=True, quant_type="nf4")
        own, first = part(self.weight)
        own.copy_(packed[first : first + len(own)])

    def dequantised(self) -> torch.Tensor:
        """Return the weight [out, in] in the compute dtype."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.weight.data, self.state)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product, computed in the compute dtype, in the dtype of the input."""
        from bitsandbytes import matmul_4bit

        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y: torch.Tensor = matmul_4bit(input.to(self.compute_dtype), self.weight, bias=bias, quant_state=self.state)
        return y.to(input.dtype)
