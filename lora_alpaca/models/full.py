"""Full finetuning: the weights of a base that learn, all or those of its last layers.

They are held in fp32 whatever the run computes in, since the updates of a low learning rate are lost in 16 bits. What
stays frozen is held in the compute dtype.
"""

import re
from typing import Any

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import CheckpointError, ModelError
from lora_alpaca.models.layers import decoder_layers, last_layers
from lora_alpaca.models.trainable import State

_NO_MLP = re.compile(r"attn|attention|mixer|norm|ln_|\bln\d?$")  # in the names of a layer's other parts


def mark_learning(model: Any, config: FinetuneConfig, dtype: torch.dtype) -> Any:
    """Return a base whose learning weights require a gradient and are fp32; the others are frozen, and in `dtype`.

    It may be on the meta device. Raises ModelError where --layer_parts mlp finds no MLP in a layer.
    """
    learning = {id(parameter) for parameter in _learning(model, config)}
    for parameter in model.parameters():
        learns = id(parameter) in learning
        if parameter.is_floating_point():
            # a weight that learns must not be a view of the file, as one may be that is in this dtype already
            parameter.data = parameter.data.to(torch.float32 if learns else dtype, copy=learns)
        parameter.requires_grad_(learns)
    return model


def _learning(model: Any, config: FinetuneConfig) -> list[torch.nn.Parameter]:
    if config.layers == "all":
        return [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    name, layers = decoder_layers(model)
    parts = [layers[number] for number in last_layers(config.layers, len(layers))]
    if config.layer_parts == "mlp":
        found = [[child for part, child in layer.named_children() if not _NO_MLP.search(part)] for layer in parts]
        if not all(any(True for child in layer for _ in child.parameters()) for layer in found):
            raise ModelError(f"--layer_parts mlp: {name} has layers without an MLP of their own; leave the flag out")
        parts = [child for layer in found for child in layer]
    return [parameter for part in parts for parameter in part.parameters() if parameter.is_floating_point()]


class FullWeights:
    """The weights of a base that learn, as what is trained of it (see `Trainable`); their names are the model's own."""

    def __init__(self, model: Any):
        self.model = model
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names, self.parameters = list(named), list(named.values())

    def state(self) -> State:
        """Return a copy of the weights on the CPU. A rank that holds shards alone returns these."""
        pairs = zip(self.names, self.parameters, strict=True)
        return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in pairs}

    def load_state(self, tensors: State, where: str) -> None:
        """Copy tensors into the weights; CheckpointError, naming `where`, unless names and shapes are their own."""
        own = dict(zip(self.names, self.parameters, strict=True))
        for name in sorted(own.keys() ^ tensors.keys()):
            raise CheckpointError(f"{where}: {name} is {'missing' if name in own else 'no weight that learns here'}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise CheckpointError(f"{where}: {name} is {list(tensor.shape)}, and {list(own[name].shape)} here")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)

    def config(self) -> dict[str, Any]:
        """Return the content of the base's config.json; that of the finetuned model is the same."""
        found: dict[str, Any] = self.model.config.to_dict()
        return found
