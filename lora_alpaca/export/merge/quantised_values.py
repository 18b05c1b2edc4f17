"""The values that a base has once it is held in 8 or 4 bits: what training computed with."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.quantizers.base import get_keys_to_not_convert

from lora_alpaca.export.tensors import Tensors
from lora_alpaca.models import quantization
from lora_alpaca.models.meta import is_linear
from lora_alpaca.models.weights import TensorInfo


class QuantisedValues:
    """The tensors of a base, the weights of its layers quantised and dequantised again, in fp32.

    `names` are parameter -> name in the files, `model` is the base on the meta device, and `held` says in how many
    bits, and from what dtype, training held it.
    """

    def __init__(self, tensors: Tensors, model: Any, names: Mapping[str, str], held: quantization.Held):
        self._tensors, self._held = tensors, held
        kept = get_keys_to_not_convert(model)
        self._layers = {
            names[f"{name}.weight"]: not isinstance(part, torch.nn.Linear)
            for name, part in model.named_modules()
            if is_linear(part) and f"{name}.weight" in names and not _is_kept(name, kept)
        }
        self.infos: Mapping[str, TensorInfo] = {
            name: info._replace(dtype=torch.float32) if name in self._layers else info
            for name, info in tensors.infos.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, the weight of a layer as training held it, fp32."""
        tensor = self._tensors.read(name)
        if (transposed := self._layers.get(name)) is None:
            return tensor
        values = quantization.as_held(tensor.T if transposed else tensor, self._held)
        return values.T.contiguous() if transposed else values


def _is_kept(name: str, kept: list[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") or name.endswith(f".{one}") for one in kept)
