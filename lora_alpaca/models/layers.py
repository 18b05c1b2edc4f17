"""The decoder layers of a model, found by what they are, whatever the architecture calls them."""

from typing import Any

import torch


def decoder_layers(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """Return the name of a model's list of layers, and that list. Raises NotImplementedError where there is none."""
    count = model.config.get_text_config().num_hidden_layers
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == count:
            return name, part
    raise NotImplementedError("its layers are in no list")
