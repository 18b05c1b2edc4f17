"""A base model without its weights: what can be known about it before the first heavy step."""

import copy
from typing import Any

import torch
import transformers

from lora_alpaca.models.base import Base, as_model_error, without_report
from lora_alpaca.models.device import DeviceSpec


def meta_model(base: Base) -> Any:
    """Return the base without its weights, on the meta device: how its layers are called, and how large they are.

    None where code that the model brings cannot be run so.
    """
    try:
        with as_model_error(f"--base_model {base.name}"), without_report(), torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(base.config), trust_remote_code=base.trust_remote_code
            )
    except Exception:
        if base.trust_remote_code:
            return None
        raise


def memory_bytes(model: Any, spec: DeviceSpec) -> int:
    """Return an estimate of the bytes that the frozen weights of a model take: no activations, no adapter.

    Linear layers but the head are held in 8 or 4 bits, with a scale for every 64 values in the latter case.
    """
    head = model.get_output_embeddings()
    layers = {id(part.weight): part.weight for part in model.modules() if is_linear(part) and part is not head}
    linear = sum(weight.numel() for weight in layers.values())
    other = sum(parameter.numel() for parameter in model.parameters()) - linear
    bits = {16: 8 * spec.dtype.itemsize, 8: 8, 4: 4.5}[spec.bits]
    return int(linear * bits / 8) + other * spec.dtype.itemsize


def is_linear(part: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer, GPT-2's transposed ones included."""
    return isinstance(part, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
