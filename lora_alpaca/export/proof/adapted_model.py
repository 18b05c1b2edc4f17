"""Base + adapters as PEFT itself computes them: what a merge is held to."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.errors import AdapterError
from lora_alpaca.models.adapter_layers import as_loaded, put_on


def with_adapters(bare: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    """Return a base on the meta device with adapters, each with a weight, whose tensors are in memory.

    Their changes are summed. Raises AdapterError for one that does not fit.
    """
    model: Any = None
    names = ["default", *(f"adapter_{number}" for number in range(1, len(adapters)))]
    for name, (folder, weight) in zip(names, adapters, strict=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = PeftConfig.from_pretrained(str(folder))
                model = put_on(bare if model is None else model, config, name)
                tensors = as_loaded(model, adapter_folder.read_weights(folder), name)
                model.load_state_dict(tensors, strict=False, assign=True)  # PEFT itself would move them to meta
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise AdapterError(f"{folder}: the adapter does not fit this base model ({reason})") from None
        if weight != 1:
            for layer in model.modules():
                if isinstance(scaling := getattr(layer, "scaling", None), dict) and name in scaling:
                    scaling[name] *= weight
    if len(names) > 1:
        model.base_model.set_adapter(names)
    return model
