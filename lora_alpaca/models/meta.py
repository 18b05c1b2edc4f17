"""A base model without its weights: what can be known about it before the first heavy step."""

import copy
import math
from typing import Any, NamedTuple

import torch
import transformers

from lora_alpaca.models.base import Base, as_model_error, without_report
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.layers import decoder_layers

BLOCK, NESTED_BLOCK = 64, 256  # of NF4: values that share a scale of 8 bits, and scales that share one of fp32


class Weight(NamedTuple):
    """A weight of a base. `outputs` are those of a linear layer, which 8 and 4 bits can hold, and 0 for all others."""

    shape: tuple[int, ...]
    outputs: int
    is_trained: bool

    @property
    def numel(self) -> int:
        """Return the number of its values."""
        return math.prod(self.shape)

    def frozen_bytes(self, spec: DeviceSpec) -> int:
        """Return the bytes that the weight takes as a frozen one: in 8 and 4 bits, with its scales."""
        if not self.outputs or spec.bits == 16:
            return spec.dtype.itemsize * self.numel
        if spec.bits == 8:
            return self.numel + 4 * self.outputs  # a scale for each
        scales = math.ceil(self.numel / BLOCK)
        return math.ceil(self.numel / 2) + scales + 4 * math.ceil(scales / NESTED_BLOCK)


Units = tuple[tuple[Weight, ...], ...]  # the weights outside the decoder layers, then those of layer after layer


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


def weights_by_unit(model: Any) -> Units:
    """Return the weights of a model by what sharding gathers at a time; all are outside where it has no layers."""
    head = model.get_output_embeddings()
    linear = [part for part in model.modules() if is_linear(part) and part is not head]
    outputs = {id(part.weight): getattr(part, "out_features", 0) or part.nf for part in linear}
    try:
        name, layers = decoder_layers(model)
    except NotImplementedError:
        name, layers = "", torch.nn.ModuleList()
    units: list[list[Weight]] = [[] for _ in range(1 + len(layers))]
    for full_name, parameter in model.named_parameters():
        place, is_inside = 0, bool(name) and full_name.startswith(f"{name}.")
        if is_inside:
            place = 1 + int(full_name.removeprefix(f"{name}.").partition(".")[0])
        units[place].append(Weight(tuple(parameter.shape), outputs.get(id(parameter), 0), parameter.requires_grad))
    return tuple(map(tuple, units))


def units_of_config(config: Any) -> Units:
    """Return about the weights of a model that cannot be made: a layer of a transformer has 12 width² parameters."""
    shape = config.get_text_config()
    outside = (Weight((shape.vocab_size, shape.hidden_size), outputs=0, is_trained=False),)
    layer = (Weight((12 * shape.hidden_size, shape.hidden_size), 12 * shape.hidden_size, is_trained=False),)
    return (outside, *[layer] * shape.num_hidden_layers)


def memory_bytes(model: Any, spec: DeviceSpec) -> int:
    """Return an estimate of the bytes that the frozen weights of a model take: no activations, no adapter."""
    return sum(weight.frozen_bytes(spec) for unit in weights_by_unit(model) for weight in unit)


def is_linear(part: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer, GPT-2's transposed ones included."""
    return isinstance(part, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
