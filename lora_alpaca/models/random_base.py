"""A base of the architecture of another, with its widths and vocabulary, few layers, and random weights."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_alpaca.models.base import Base, as_model_error, without_report

DRAWN, SCALE = 65_537, 0.02  # numbers that are drawn, and repeated in every weight; their standard deviation


def with_layers(config: Any, layers: int) -> Any:
    """Return a copy of a config with its first layers alone, unquantised; what it lists for every layer is cut too."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None):
        del config.quantization_config
    text = config.get_text_config()
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers
    return config


@torch.no_grad()
def write(base: Base, folder: Path, layers: int) -> None:
    """Write a base with so many layers and random weights, in the dtype that the base is stored in, into a folder."""
    config = with_layers(base.config, layers)
    dtype = config.get_text_config().dtype or torch.float32
    with as_model_error(f"--base_model {base.name}"), without_report():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.to_empty(device="cpu")
        model.tie_weights()
        drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0)).mul_(SCALE).to(dtype)
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                parameter.copy_(drawn.repeat(-(-parameter.numel() // DRAWN))[: parameter.numel()].view(parameter.shape))
        model.save_pretrained(folder)
