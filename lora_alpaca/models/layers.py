"""The decoder layers of a model, found by what they are, whatever the architecture calls them."""

from typing import Any

import torch

from lora_alpaca.errors import ConfigError
from lora_alpaca.models.base import Base


def library_model(model: Any) -> Any:
    """Return the model as transformers makes it: a model itself, or the one within PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """Return the name of a model's list of layers, and that list. Raises NotImplementedError where there is none."""
    count = model.config.get_text_config().num_hidden_layers
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == count:
            return name, part
    raise NotImplementedError("its layers are in no list")


def last_layers(asked: str, count: int) -> list[int]:
    """Return the numbers of the layers, of so many, that --layers asks for, as in `top:2`."""
    if asked == "all":
        return list(range(count))
    return list(range(count))[-int(asked.removeprefix("top:")) :]


def check_layers(asked: str, base: Base) -> None:
    """Raise ConfigError where --layers asks for more layers than a base has."""
    count = base.config.get_text_config().num_hidden_layers
    if asked != "all" and int(asked.removeprefix("top:")) > count:
        raise ConfigError(f"--layers {asked}: {base.name} has {count} layers")
