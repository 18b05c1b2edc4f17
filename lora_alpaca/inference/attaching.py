"""Adapters put on a loaded model: one is added to the weights where precision allows it, others stay beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.layers.low_rank import AtWork, LowRank
from lora_alpaca.inference.layers.merged_weights import MergedWeights, NotMerged
from lora_alpaca.inference.sampling import BASE
from lora_alpaca.models.adapter_layers import AdapterLayers
from lora_alpaca.models.base import Base
from lora_alpaca.models.changes import Change, Product
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.meta import meta_model

Changes = dict[str, list[Change]]  # what an adapter makes of tensors, by their names in memory


def attach(model: Any, base: Base, spec: DeviceSpec, folders: Mapping[str, Path], merge: str) -> tuple[Adapters, str]:
    """Return the adapters of folders, by name, on a base, and a note on where they are.

    `merge` is what --merge_adapter says; `auto` is decided here alone. Raises ConfigError where that cannot be done,
    AdapterError for adapters that do not fit.
    """
    if not folders:
        return Adapters(model), ""
    several, bare = len(folders) > 1, meta_model(base)
    changes = {} if bare is None else {name: changes_of(base, folder) for name, folder in folders.items()}
    reason = (
        "as asked" if merge == "false" else
        "there are several" if several else
        "they are quantised" if spec.bits != 16 else
        f"{base.name} brings code of its own" if bare is None else ""
    )  # fmt: skip
    if not reason:
        (name,) = folders
        try:
            weights = MergedWeights(model, changes[name], name, anyway=merge == "true")
            return Adapters(model, [name], weights.put), f"the adapter is added to the weights in memory{weights.note}"
        except NotMerged as error:
            reason = str(error)
    if merge == "true":
        raise ConfigError(f"--merge_adapter true: the weights stay as they are: {reason}; leave the flag out")
    is_transposed = any(isinstance(part, Conv1D) for part in bare.modules()) if bare is not None else True
    adapters = None if is_transposed else _thin(model, spec, changes)
    what = "adapters are" if several else "adapter is"
    return adapters or _by_peft(model, folders), f"the {what} computed beside the weights: {reason}"


def changes_of(base: Base, folder: Path) -> Changes:
    """Return what the adapter of a folder makes of a base."""
    tensors = adapter_folder.read_weights(folder, may_do_nothing=True)
    return AdapterLayers(meta_model(base), folder, tensors, f"{folder} on {base.name}").changes


def _thin(model: Any, spec: DeviceSpec, changes: Mapping[str, Changes]) -> Adapters | None:
    """Return adapters that are thin products beside linear layers, None where one of them is more than that."""
    factors: dict[str, dict[str, Any]] = {}  # by layer, then by adapter
    for name, of_adapter in changes.items():
        for tensor, made in of_adapter.items():
            layer = tensor.removesuffix(".weight")
            if layer == tensor or len(made) != 1 or not isinstance(product := made[0], Product):
                return None
            pair = product.right, product.left * product.scale
            factors.setdefault(layer, {})[name] = tuple(one.to(spec.device, spec.dtype) for one in pair)
    layers = {name: model.get_submodule(name) for name in factors}
    if not all(isinstance(layer, nn.Linear) for layer in layers.values()):
        return None
    at_work = AtWork(next(iter(changes)))
    for name, layer in layers.items():
        layer.forward = LowRank(layer, factors[name], at_work)
    return Adapters(model, list(changes), at_work.put)


def _by_peft(model: Any, folders: Mapping[str, Path]) -> Adapters:
    """Return adapters of any kind, as PEFT computes them."""
    (first, folder), *others = folders.items()
    peft_model = adapter_folder.load(model, folder).eval()
    keys = {first: "default"}  # a name of PEFT's has no dots
    for number, (name, folder) in enumerate(others, 1):
        keys[name] = f"adapter_{number}"
        adapter_folder.load_another(peft_model, folder, keys[name])

    def put(name: str) -> None:
        if name == BASE:
            peft_model.base_model.disable_adapter_layers()
        else:
            peft_model.base_model.enable_adapter_layers()
            peft_model.set_adapter(keys[name], inference_mode=True)

    put(first)
    return Adapters(peft_model, list(folders), put)
