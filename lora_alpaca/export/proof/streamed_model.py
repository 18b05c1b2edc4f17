"""A model that is computed layer by layer, with weights that are read when a layer needs them.

The model is built without weights. Before the forward of each of its parts (a layer, the embeddings, a norm, the head)
its weights are read and widened, and after it they are dropped. So a model of any size gives its logits on any machine,
and what is compared is what lies on the disk.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from lora_alpaca.models.base import Base, as_model_error, without_report

Read = Callable[[str], torch.Tensor]  # a tensor by the name of the parameter in memory


@dataclass(frozen=True)
class Precision:
    """Where a model computes, and in what dtype, to which its weights are widened."""

    device: torch.device
    dtype: torch.dtype


class StreamedModel:
    """A causal language model without weights; `adapt` puts adapters on it, whose tensors stay in memory.

    Parameters that are tied to each other are read under the first of their names. `vocabulary` is the number of
    tokens if it is another one than the base's.
    """

    def __init__(
        self, base: Base, tied: bool, adapt: Callable[[Any], Any] | None = None, vocabulary: int | None = None
    ):
        config = _config(base, tied, vocabulary)
        with as_model_error(f"--base_model {base.name}"), without_report():
            with init_empty_weights(include_buffers=False):
                bare = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=base.trust_remote_code)
            bare.tie_weights()
        self._names = {id(parameter): name for name, parameter in bare.named_parameters()}
        self.model = (adapt(bare) if adapt else bare).eval()
        self._scratch: dict[tuple[int, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor, read: Read, precision: Precision, adapted: bool = True) -> torch.Tensor:
        """Return the logits, fp32 [rows, T, V] on the CPU, of ids, int64 [rows, T], with or without the adapter."""
        with ExitStack() as undo:
            undo.callback(self._scratch.clear)
            for part in _parts(self.model):
                weights = self._weights(part, read, precision)
                undo.callback(weights.drop)  # of a forward that failed
                undo.callback(part.register_forward_pre_hook(weights.take).remove)
                undo.callback(part.register_forward_hook(weights.drop).remove)
            undo.enter_context(nullcontext() if adapted else without_adapter(self.model))
            logits: torch.Tensor = self.model(input_ids=ids.to(precision.device), use_cache=False).logits
            return logits.float().cpu()

    @contextmanager
    def loaded(self, read: Read, precision: Precision) -> Iterator[Any]:
        """Give the model with all of its weights, within this context."""
        parts = [self._weights(part, read, precision) for part in _parts(self.model)]
        try:
            for weights in parts:
                weights.take()
            yield self.model
        finally:
            for weights in parts:
                weights.drop()
            self._scratch.clear()

    def _weights(self, part: torch.nn.Module, read: Read, precision: Precision) -> "_Weights":
        return _Weights(part, self._names, read, precision, self._scratch)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Within this context, a PEFT model is its base; of trained biases, which stay, PEFT's warning is not passed on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        with model.disable_adapter():
            yield


class _Weights:
    """The weights of a part of a model, put into it and taken out again."""

    def __init__(
        self,
        part: torch.nn.Module,
        names: dict[int, str],
        read: Read,
        precision: Precision,
        scratch: dict[tuple[int, torch.dtype], list[torch.Tensor]],
    ):
        self._read, self._precision, self._scratch = read, precision, scratch
        self._slots = [
            (module, key, parameter, names.get(id(parameter), ""))
            for module in part.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._taken: list[torch.Tensor] = []

    def take(self, *_: Any) -> None:
        """Put the weights into the part: those of the base are read, those of an adapter are there."""
        for module, key, parameter, name in self._slots:
            if parameter.is_meta and not name:  # what a trained copy stands for; no forward uses it
                continue
            weight = self._widened(self._read(name) if parameter.is_meta else parameter.data)
            module._parameters[key] = torch.nn.Parameter(weight, requires_grad=False)

    def drop(self, *_: Any) -> None:
        """Take the weights out again."""
        for module, key, parameter, _name in self._slots:
            module._parameters[key] = parameter
        for buffer in self._taken:
            self._scratch[buffer.numel(), buffer.dtype].append(buffer)
        self._taken.clear()

    def _widened(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor in the dtype of the computation; memory that another part has left is used again."""
        device, dtype = self._precision.device, self._precision.dtype
        if device.type != "cpu" or tensor.dtype == dtype or not tensor.is_floating_point():
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        left = self._scratch[tensor.numel(), dtype]
        buffer = left.pop() if left else torch.empty(tensor.numel(), dtype=dtype)
        self._taken.append(buffer)
        return buffer.view(tensor.shape).copy_(tensor)


def state_of(
    base: Base, tensors: dict[str, torch.Tensor], tied: bool, vocabulary: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors that transformers makes in memory of all tensors of a base's files, by their names there."""
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    with as_model_error(f"--base_model {base.name}"), without_report():
        config = _config(base, tied, vocabulary)
        with torch.device("meta"):
            kind = type(transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=base.trust_remote_code))
        model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


def _config(base: Base, tied: bool, vocabulary: int | None) -> Any:
    config = copy.deepcopy(base.config)
    config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = tied
    config.get_text_config().vocab_size = vocabulary or config.get_text_config().vocab_size
    return config


def _parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the parts of a model that are computed one after another: its layers, and what is around them."""
    wrapped = any(hasattr(module, name) for name in ("base_layer", "original_module", "token_adapter"))
    if isinstance(module, torch.nn.ModuleList):
        yield from module
    elif wrapped or next(module.parameters(recurse=False), None) is not None:
        yield module
    else:
        for child in module.children():
            yield from _parts(child)
