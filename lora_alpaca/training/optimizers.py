"""The optimizers, and their state by the names of the parameters.

AdamW works on the shards of sharded weights, which are DTensors, and its state is spread as they are. The others do
not: 8-bit moments are scaled in blocks that a shard cuts, and Adafactor's means are of whole rows and columns.
"""

from collections.abc import Sequence
from typing import Any

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import ConfigError
from lora_alpaca.models.trainable import State

Parameters = Sequence[torch.nn.Parameter]
CODES = ("qmap1", "qmap2")  # of bitsandbytes: the values that 8 bits stand for, the same for all parameters
SMALLEST = 1e-18  # of a root mean square in Adafactor: its square, in fp32, is more than 0


def build(config: FinetuneConfig, names: Sequence[str], parameters: Parameters) -> torch.optim.Optimizer:
    """Return the optimizer that --optimizer names, its learning rate to be set before each step by `set_rate`.

    --weight_decay is of all parts of an adapter; of the weights of a base, norms and biases (what has one dimension)
    do not decay, as in most trainers. Adafactor is torch's, whose rate is usually a part of the weights' root mean
    square; here it is taken as it is, as AdamW takes it and transformers' Trainer lets Adafactor take it, so that one
    --learning_rate is meant alike by all of them and an adapter whose B is zero learns. Raises ConfigError where
    bitsandbytes cannot do what is asked.
    """
    groups, decay = _groups(config, names, parameters), config.weight_decay
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=0.0, eps=(SMALLEST, 1.0), weight_decay=decay)
    if config.optimizer == "adamw_8bit":
        return _adamw_8bit(groups, parameters[0].device)
    # of many weights: without fusing, a GPU makes temporary copies of all of them
    fused = True if config.tune == "full" and parameters[0].device.type == "cuda" else None
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=decay, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the next step: the given one, times the ratio that a group of parameters has."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]


def _groups(config: FinetuneConfig, names: Sequence[str], parameters: Parameters) -> list[dict[str, Any]]:
    """Return the parameters in groups by their weight decay and the ratio of their rate to the run's.

    The ratio of --lora_plus_ratio is that of B, and of DoRA's magnitudes, as PEFT has it.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in zip(names, parameters, strict=True):
        decays = config.tune == "lora" or parameter.dim() > 1
        is_faster = "lora_B." in name or "lora_embedding_B." in name or "lora_magnitude_vector." in name
        ratio = config.lora_plus_ratio if config.lora_plus_ratio and is_faster else 1.0
        groups.setdefault((config.weight_decay if decays else 0.0, ratio), []).append(parameter)
    return [{"params": group, "weight_decay": decay, "ratio": ratio} for (decay, ratio), group in groups.items()]


def _adamw_8bit(groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW, tried on a device before. It holds moments of small tensors in fp32."""
    try:
        import bitsandbytes

        trial = torch.nn.Parameter(torch.zeros(4096, device=device))
        trial.grad = torch.ones_like(trial)
        bitsandbytes.optim.AdamW8bit([trial], lr=1.0).step()
        if not trial.any():
            raise RuntimeError("it moves nothing")
    except Exception as error:  # of a library that is missing, or that has no such kernel for the device
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"--optimizer adamw_8bit: bitsandbytes cannot do it on {device.type} ({reason})") from None
    found: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=0.0)
    return found


def require_whole(config: FinetuneConfig, shard: str) -> None:
    """Raise ConfigError for an optimizer that cannot have sharded weights."""
    if config.tune == "full" and shard != "none" and config.optimizer != "adamw":
        raise ConfigError(
            f"--optimizer {config.optimizer} takes whole weights, and --shard {shard} spreads them; leave it out, "
            "or say --shard none"
        )


def state(optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Parameters) -> State:
    """Return the optimizer's state as tensors named PARAMETER.KIND, as in `lm_head.weight.exp_avg`.

    They are the tensors themselves, not copies, on whatever device; of a sharded parameter they are DTensors of its
    placement, or whole where they are the same on every rank. Empty before the first step.
    """
    return {
        f"{name}.{kind}": value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        for name, parameter in zip(names, parameters, strict=True)
        for kind, value in optimizer.state.get(parameter, {}).items()
        if kind not in CODES
    }


def load_state(optimizer: torch.optim.Optimizer, names: Sequence[str], parameters: Parameters, tensors: State) -> None:
    """Put back what `state` returned; tensors are taken over, on the devices where the optimizer has them."""
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        by_name.setdefault(name, {})[kind] = value
    is_8bit = hasattr(optimizer, "name2qmap")
    fused = bool(optimizer.param_groups[0].get("fused"))
    for name, parameter in zip(names, parameters, strict=True):
        if name not in by_name:
            continue
        own = by_name[name]
        kept = own.get("step")
        found = {kind: value.to(parameter.device) for kind, value in own.items()}
        if kept is not None and not fused:
            found["step"] = int(kept) if is_8bit else kept.cpu()
        if is_8bit and found["state1"].dtype == torch.uint8:
            found |= dict(zip(CODES, _codes(optimizer, parameter.device), strict=True))
        optimizer.state[parameter] = found


def _codes(optimizer: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the 8 bits of the two moments stand for."""
    if "dynamic" not in optimizer.name2qmap:
        optimizer.fill_qmap()
    for name in ("dynamic", "udynamic"):
        optimizer.name2qmap[name] = optimizer.name2qmap[name].to(device)
    return optimizer.name2qmap["dynamic"], optimizer.name2qmap["udynamic"]
