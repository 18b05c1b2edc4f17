"""The size of a base with what is trained of it, from its config and options alone."""

from typing import Any

import torch

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.models import lora
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.full import mark_learning
from lora_alpaca.models.meta import units_of_config, weights_by_unit
from lora_alpaca.planning.estimate import ModelSize
from lora_alpaca.storage.paths import user_path


def model_size(config: FinetuneConfig, base: Base, spec: DeviceSpec, model: Any | None) -> ModelSize:
    """Return the size of a base with what a run trains of it; `model` is the base on the meta device.

    Where there is none (code that a base brings may not run there), the size follows from the base's config, without an
    adapter. An adapter is put on the model. Raises ModelError for target modules that are missing.
    """
    shape = base.config.get_text_config()
    if model is None:
        units = units_of_config(base.config)
    else:
        learns = config.tune == "full"
        units = weights_by_unit(mark_learning(model, config, spec.dtype) if learns else model.requires_grad_(False))
    return ModelSize(
        layers=shape.num_hidden_layers,
        width=shape.hidden_size,
        vocabulary=shape.vocab_size,
        units=units,
        adapter=_adapter(config, base, model),
        spec=spec,
        optimizer=config.optimizer,
        is_mapped=_is_mapped(base, spec),
        frozen_layers=max(0, shape.num_hidden_layers - _top(config)) if _top(config) else 0,
    )


def _adapter(config: FinetuneConfig, base: Base, model: Any | None) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the parameters of the adapter, which is put on the model."""
    if config.tune == "full":
        return ()
    if config.init_adapter:
        tensors = adapter_folder.read_weights(user_path(config.init_adapter), may_do_nothing=True)
        return tuple(tuple(tensor.shape) for tensor in tensors.values())
    if model is None:
        return ()
    with torch.device("meta"):
        adapter = lora.attach(model, config, base)
    return tuple(tuple(parameter.shape) for parameter in lora.trainable_parameters(adapter))


def _top(config: FinetuneConfig) -> int:
    """Return how many of the last layers --layers names, 0 for all."""
    return 0 if config.layers == "all" else int(config.layers.partition(":")[2])


def _is_mapped(base: Base, spec: DeviceSpec) -> bool:
    """Return whether the weights in memory are views of the base's files, which a CPU needs not copy."""
    return spec.device.type == "cpu" and spec.bits == 16 and base.config.dtype == spec.dtype
