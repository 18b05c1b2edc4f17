"""The optimizers, and their state by the names of the parameters.

A parameter of sharded weights is a DTensor; its state is one too, or belongs to its shard on this rank.
"""

from collections.abc import Sequence
from typing import Any

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import ConfigError
from lora_alpaca.models.trainable import State

Parameters = Sequence[torch.nn.Parameter]


def build(config: FinetuneConfig, parameters: Parameters) -> torch.optim.Optimizer:
    """Return the optimizer that --optimizer names, its learning rate to be set before each step.

    --weight_decay is of all parts of an adapter; of the weights of a base, norms and biases (what has one dimension)
    do not decay, as in most trainers.
    """
    if config.optimizer != "adamw":
        raise ConfigError(f"--optimizer {config.optimizer}: not there yet")
    return torch.optim.AdamW(_groups(config, parameters), lr=0.0, weight_decay=config.weight_decay)


def _groups(config: FinetuneConfig, parameters: Parameters) -> list[dict[str, Any]]:
    """Return the parameters in groups by their weight decay; one group where all have the same."""
    decay = config.weight_decay
    if config.tune == "lora" or not decay:
        return [{"params": list(parameters), "weight_decay": decay}]
    return [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": decay},
        {"params": [one for one in parameters if one.dim() < 2], "weight_decay": 0.0},
    ]


def state(optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Parameters) -> State:
    """Return the optimizer's state as tensors named PARAMETER.KIND, as in `lm_head.weight.exp_avg`.

    They are the tensors themselves, not copies, on whatever device; of a sharded parameter they are DTensors of its
    placement, or whole where they are the same on every rank. Empty before the first step.
    """
    found = {}
    for name, parameter in zip(names, parameters, strict=True):
        for kind, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}.{kind}"] = value
    return found


def load_state(optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Parameters, tensors: State) -> None:
    """Put back what `state` returned; tensors are taken over, on the device and in the placement of `state`."""
    by_name: dict[str, State] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        by_name.setdefault(name, {})[kind] = value
    for name, parameter in zip(names, parameters, strict=True):
        if name in by_name:
            optimizer.state[parameter] = by_name[name]
