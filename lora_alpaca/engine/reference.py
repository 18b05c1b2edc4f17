"""What packs are compared with: rows alone, by the library's own model, with a loss in fp64; in fp64 on a slice of it.

A model in 16 bits rounds by some per cent, in which a fault of 2 % does not show. A slice of it, its first layers and
its head, is therefore computed in fp32 as packs, and in fp64 as rows alone; both with the weights that it has.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lora_alpaca.engine.batches import Batch
from lora_alpaca.engine.engines import Padded
from lora_alpaca.engine.loss import cross_entropy
from lora_alpaca.engine.model_access import is_sharded
from lora_alpaca.engine.patches import set_until
from lora_alpaca.models import quantization
from lora_alpaca.models.layers import decoder_layers

FEWEST = 2  # layers of a slice: one to make an error, and one to pass it on


@dataclass(frozen=True)
class Reference(Padded):
    """Rows through the library's own forward, with a loss in fp64, whose own error is a millionth of any limit."""

    def compute(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of every prediction of a batch, [T]."""
        logits = self.model(**batch.inputs(), use_cache=False).logits.flatten(0, 1)  # [tokens, V]
        logits, labels = logits.index_select(0, batch.indices), batch.labels
        if self.device.type == "mps":  # which has no fp64
            return cross_entropy(logits.cpu(), labels.cpu(), torch.float64).float().to(self.device)
        return cross_entropy(logits, labels, torch.float64)


@contextmanager
def first_layers(model: Any) -> Iterator[int]:
    """Within this context, a model has only its first layers: at least two, and every kind of layer that it has.

    Yield how many these are.
    """
    config = model.config.get_text_config()
    name, layers = decoder_layers(model)
    types = getattr(config, "layer_types", None) or [""] * len(layers)
    kinds = [(kind, _kind(layer)) for kind, layer in zip(types, layers, strict=True)]
    count = min(len(layers), max([FEWEST, *(kinds.index(kind) + 1 for kind in kinds)]))
    above, _, attribute = name.rpartition(".")
    parent = model.get_submodule(above)
    setattr(parent, attribute, layers[:count])
    try:
        yield count
    finally:
        setattr(parent, attribute, layers)


def _kind(layer: torch.nn.Module) -> tuple[Any, ...]:
    """Return what tells a layer from one that computes something else: its modules, their shapes and windows."""
    return tuple(
        (
            name,
            type(part).__name__,
            *(str(getattr(part, key, "")) for key in ("sliding_window", "attention_type", "is_causal")),
            *(tuple(parameter.shape) for parameter in part.parameters(recurse=False)),
        )
        for name, part in layer.named_modules()
    )


@contextmanager
def learning(model: Any) -> Iterator[None]:
    """Within this context, something of a model learns: its norms and biases, where nothing else does.

    With --layers top:N, what is trained may be above the first layers, and a gradient is what is compared.
    """
    parameters = list(model.parameters())
    vectors = [one for one in parameters if one.dim() == 1 and one.is_floating_point() and not is_sharded(one)]
    chosen = [] if any(one.requires_grad for one in parameters) else vectors
    for parameter in chosen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)


@contextmanager
def computing_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Within this context, a model computes in fp32 or fp64, with the values of the weights that it has.

    Sharded weights are cast in each call of their module, and are kept for its backward.
    """
    short = (torch.bfloat16, torch.float16)
    with ExitStack() as undo:
        for parameter in model.parameters():
            if parameter.is_floating_point() and not is_sharded(parameter):
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = parameter.data.to(dtype)
        for buffer in model.buffers():
            if buffer.dtype in short:
                undo.callback(setattr, buffer, "data", buffer.data)
                buffer.data = buffer.data.to(dtype)
        for module in model.modules():
            if quantization.is_four_bit(module):  # bitsandbytes itself knows no fp64
                set_until(undo, module, "forward", _dequantised(module, dtype))
            if any(map(is_sharded, module.parameters(recurse=False))):
                weights = _CastWeights(dtype)
                undo.callback(module.register_forward_pre_hook(weights.cast).remove)
                # before other hooks, which may take away what was gathered
                undo.callback(module.register_forward_hook(weights.restore, prepend=True, always_call=True).remove)
        yield


class _CastWeights:
    """Two hooks around the call of a module, within which its own weights are in `dtype`."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._before: dict[str, Any] = {}

    def cast(self, module: torch.nn.Module, args: Any) -> None:
        """Put longer copies into the module; they are part of the graph, so gradients reach the weights."""
        own: dict[str, Any] = module._parameters  # torch asks for parameters only where attributes are set
        self._before = dict(own)
        for name, part in self._before.items():
            if part is not None and _is_shorter(part, self._dtype):
                own[name] = part.to(self._dtype)

    def restore(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Put the weights back that the module had."""
        module._parameters.update(self._before)
        self._before = {}


def _is_shorter(part: torch.Tensor, dtype: torch.dtype) -> bool:
    return part.is_floating_point() and part.dtype.itemsize < dtype.itemsize


def _dequantised(module: Any, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the forward of a 4-bit layer in a dtype."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight = quantization.four_bit_weight(module)
        assert weight is not None
        return F.linear(x, weight.to(dtype), None if module.bias is None else module.bias.to(dtype))

    return forward


def bytes_in(model: Any, dtype: torch.dtype) -> int:
    """Return what `computing_in` adds to the memory that a model takes."""
    of_a_parameter = {torch.uint8: 2, torch.int8: 0}  # two 4-bit weights in a byte; of 8 bits, one layer at a time
    return sum(part.numel() * of_a_parameter.get(part.dtype, 1) for part in model.parameters()) * dtype.itemsize
