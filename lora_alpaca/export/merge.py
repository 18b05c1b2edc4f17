"""The merge: one merged tensor after another, W + scale * B A, for a writer to consume."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lora_alpaca.errors import ExportError
from lora_alpaca.models import lora

Named = tuple[str, torch.Tensor]


class Deltas:
    """What the adapter of a PEFT model adds to the tensors of its base, by their names in the base's files."""

    def __init__(self, model: Any):
        self._adapter = model.active_adapter
        self._layers = lora.lora_layers(model)

    def __contains__(self, name: str) -> bool:
        layer, _, kind = name.rpartition(".")
        return layer in self._layers and (kind == "weight" or (kind == "bias" and self._trains_bias(layer)))

    @torch.no_grad()
    def delta(self, name: str) -> torch.Tensor:
        """Return what is added to a tensor, in the precision of the adapter, which is fp32.

        Of a weight it is scale * B A, [out, in], or [in, out] for GPT-2's Conv1D. The scale is alpha / r, or
        alpha / sqrt(r) if the adapter is rank-stabilised. With DoRA it includes the new magnitudes.
        """
        layer, weight = self._layer(name), self._layer(name).get_base_layer().weight
        if name.endswith(".bias"):
            return layer.lora_B[self._adapter].bias * layer.scaling[self._adapter]
        if self._adapter in layer.lora_variant:
            return self.merged(name, weight) - weight
        delta: torch.Tensor = layer.get_delta_weight(self._adapter)
        return delta

    @torch.no_grad()
    def merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the base with its delta added, in its dtype. Raises ExportError for NaN or infinity."""
        layer = self._layer(name)
        if name.endswith(".weight") and self._adapter in layer.lora_variant:  # DoRA, of which PEFT knows the rule
            merged = layer.lora_variant[self._adapter].merge_safe(layer, self._adapter, tensor.detach().clone())
        else:
            merged = tensor + self.delta(name).to(tensor.dtype)
        if not torch.isfinite(merged).all():
            raise ExportError(f"{name} holds NaN or infinity once the adapter is merged into it")
        return merged

    def _layer(self, name: str) -> Any:
        return self._layers[name.rpartition(".")[0]]

    def _trains_bias(self, layer: str) -> bool:
        return bool(self._layers[layer].lora_bias.get(self._adapter))


def base_tensors(model: Any) -> Iterator[Named]:
    """Yield the parameters of the base of a PEFT model, by their names in the base's files.

    Of a module that was trained whole (`modules_to_save` of PEFT), it is the trained copy.
    """
    trained = f"modules_to_save.{model.active_adapter}."
    for name, parameter in model.get_base_model().named_parameters():
        parts = name.split(".")
        if not any(part.startswith("lora_") or part == "original_module" for part in parts):
            yield name.replace("base_layer.", "").replace(trained, ""), parameter


def merged_tensors(tensors: Iterable[Named], deltas: Deltas) -> Iterator[Named]:
    """Yield the tensors of a base, those with an adapter merged. One merged tensor is made at a time."""
    for name, tensor in tensors:
        yield name, deltas.merged(name, tensor) if name in deltas else tensor


def merge(model: Any) -> tuple[Any, int]:
    """Return the base of a PEFT model, the adapter merged into its weights, and the number of weights that changed."""
    deltas, changed = Deltas(model), 0
    parameters = dict(base_tensors(model))
    for name, tensor in merged_tensors(parameters.items(), deltas):
        if name in deltas:
            changed += name.endswith(".weight") and not torch.equal(parameters[name], tensor)
            parameters[name].data = tensor
    return model.unload(), changed
