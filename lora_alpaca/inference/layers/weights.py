"""The weights of layers as the compiled functions take them: where they lie, and how wide they are stored."""

from typing import Any

import torch
from torch import nn

from lora_alpaca.inference.layers import kernels
from lora_alpaca.inference.layers.low_rank import LowRank
from lora_alpaca.models import quantization

KINDS = {torch.float32: kernels.F32, torch.bfloat16: kernels.BF16}
VECTOR = 16  # values: the width of a weight is a multiple of it
BLOCK = 64  # values that share a scale in 4 bits


class OtherWeights(Exception):
    """A layer has weights of a kind that the compiled functions do not read."""


class Weights:
    """Describes weights, and keeps alive what the descriptions point to. Its methods raise OtherWeights."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def linear(self, layer: Any, adapter: str = "") -> kernels.Linear:
        """Return a linear layer, with what an adapter beside it adds."""
        factors = layer.forward.factors.get(adapter) if isinstance(layer.forward, LowRank) else None
        if factors is None:
            return kernels.Linear(self.matrix(layer), kernels.Matrix(), kernels.Matrix())
        a, b = factors
        extra = -a.shape[0] % VECTOR
        a, b = nn.functional.pad(a, (0, 0, 0, extra)), nn.functional.pad(b, (0, extra))
        return kernels.Linear(self.matrix(layer), self._tensor(a.contiguous()), self._tensor(b.contiguous()))

    def matrix(self, layer: Any) -> kernels.Matrix:
        """Return the weight and bias of a layer."""
        bias = None if getattr(layer, "bias", None) is None else self.floats(layer.bias)
        if (eight := quantization.eight_bit_weight(layer)) is not None:
            weight, scales = eight
            return self._made(kernels.INT8, weight, weight.shape, scales, bias)
        if (four := quantization.four_bit_parts(layer)) is not None:
            require(four.block == BLOCK and layer.in_features % BLOCK == 0, "its blocks are of another size")
            scales = torch.cat([four.scales, four.code])
            return self._made(kernels.NF4, four.packed, (layer.out_features, layer.in_features), scales, bias)
        require(isinstance(layer, (nn.Linear, nn.Embedding)), f"a {type(layer).__name__} is no linear layer")
        return self._tensor(layer.weight, bias)

    def floats(self, tensor: torch.Tensor) -> int:
        """Return where the values of a tensor are in fp32."""
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def _tensor(self, weight: torch.Tensor, bias: int | None = None) -> kernels.Matrix:
        require(weight.dtype in KINDS, f"its weights are {weight.dtype}")
        return self._made(KINDS[weight.dtype], weight, weight.shape, None, bias)

    def _made(
        self, kind: int, values: torch.Tensor, shape: Any, scales: torch.Tensor | None, bias: int | None
    ) -> kernels.Matrix:
        require(values.device.type == "cpu" and values.is_contiguous(), "its weights lie elsewhere")
        require(shape[1] % VECTOR == 0, f"it is {shape[1]} wide")
        self._kept += [values] if scales is None else [values, scales]
        return kernels.Matrix(kind, *shape, values.data_ptr(), None if scales is None else scales.data_ptr(), bias)


def require(condition: bool, what: str) -> None:
    """Raise OtherWeights, saying what is not so, unless a condition holds."""
    if not condition:
        raise OtherWeights(what)
