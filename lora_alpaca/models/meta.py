"""A base model without its weights: what can be known about it before the first heavy step."""

import copy
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from lora_alpaca.errors import ModelError
from lora_alpaca.models import memory
from lora_alpaca.models.base import Base, as_model_error, weight_files
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.memory import gigabytes


def meta_model(base: Base) -> Any:
    """Return the base without its weights, on the meta device: how its layers are called, and how large they are.

    None where code that the model brings cannot be run so.
    """
    try:
        with as_model_error(f"--base_model {base.name}"), torch.device("meta"):
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


def check_base_fits(base: Base, spec: DeviceSpec) -> list[str]:
    """Return, in a sentence, what the base's weights will take, if that is known.

    Raises ModelError where a CPU has less memory than that, and for a folder whose weight files are not whole.
    """
    if Path(base.path).is_dir():
        weight_files(base)
    if (model := meta_model(base)) is None:
        return []
    needed = memory_bytes(model, spec)
    if spec.device.type == "cpu":
        free = memory.free_and_total(spec.device)[0] + psutil.swap_memory().free
        if needed > free:
            raise ModelError(
                f"--base_model {base.name}: its weights take {gigabytes(needed)} as {spec}, and {gigabytes(free)} "
                "are free; take a smaller model, or hold it in fewer bits (--load_8bit, --load_4bit)"
            )
    return [f"the weights of {base.name} take about {gigabytes(needed)}"]


def is_linear(part: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer, GPT-2's transposed ones included."""
    return isinstance(part, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
