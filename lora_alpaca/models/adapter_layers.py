"""What an adapter, of any kind that PEFT merges, makes of each tensor of a base, without the base itself.

PEFT puts the adapter on the base on the meta device, and so decides which layers carry what. Plain LoRA is a product
of two matrices. A layer of another kind is given the tensor, merges it by PEFT's own rule, and is let go again.
"""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.models import quick_import  # noqa: F401  before PEFT

# isort: split
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch.nn.modules.module import _IncompatibleKeys

from lora_alpaca.errors import AdapterError
from lora_alpaca.models.adapter_kinds import ADDING, BIASES, require_mergeable
from lora_alpaca.models.changes import Change, Product, Rows, Rule, Sum, Whole
from lora_alpaca.models.lora import require_cheap_matching
from lora_alpaca.models.trainable import State

NAME = "default"  # what PEFT calls the adapter in memory
PREFIX = "base_model.model."
TOKENS = "trainable_tokens_delta"


class AdapterLayers:
    """The changes that an adapter makes: `changes` is name of a tensor in memory -> its changes, one after another.

    `bare` is the base on the meta device, and belongs to the adapter from then on. `pair` names adapter and base.
    Raises AdapterError for tensors that are not those of the adapter on this base.
    """

    def __init__(self, bare: Any, folder: Path, tensors: State, pair: str):
        embeddings = embedding_names(bare)
        self.changes: dict[str, list[Change]] = {}
        with _one_line(pair):
            self._config: Any = PeftConfig.from_pretrained(str(folder))
            self._kind = require_mergeable(self._config, folder)
            _resize(bare, tensors)
            self._parameters = dict(bare.named_parameters(remove_duplicate=False))
            self._model = put_on(bare, self._config)
            own = get_peft_model_state_dict(self._model, save_embedding_layers=False)
            self._tensors = as_loaded(self._model, tensors)
            self._require_same(as_loaded(self._model, own).keys(), pair)
            self._layers = dict(_outermost(bare))
            for name, tensor in self._tensors.items():
                if (here := _in_base(name)) in self._parameters:  # saved beside the adapter: embeddings, or biases
                    self._add(here, Whole(tensor, trained=here not in embeddings))
            self._states = _by_layer(self._tensors, self._layers)
            for name, layer in self._layers.items():
                self._read(name, layer)

    def _add(self, name: str, change: Change) -> None:
        self.changes.setdefault(name, []).append(change)

    def _require_same(self, own: Collection[str], pair: str) -> None:
        """Raise AdapterError unless the tensors of the file are the adapter's own, and perhaps some of the base."""
        there = self._model.state_dict()
        for name in sorted(own - self._tensors.keys()):
            raise AdapterError(f"{pair}: {_short(name)} is missing; wrong base model?")
        for name, tensor in sorted(self._tensors.items()):
            if name not in there or (name not in own and _in_base(name) not in self._parameters):
                raise AdapterError(f"{pair}: {_short(name)} is not part of this base model; wrong base model?")
            if tensor.shape != there[name].shape:
                needed = f"the base model needs {list(there[name].shape)}"
                raise AdapterError(f"{pair}: {_short(name)} is {list(tensor.shape)}, {needed}")

    def _read(self, name: str, layer: Any) -> None:
        """Add the changes of a layer, by its name in the base."""
        state = self._states.get(name, {})
        if isinstance(layer, ModulesToSaveWrapper) or self._kind == "LN_TUNING":
            for key, tensor in state.items():
                self._add(f"{name}.{key.partition(f'.{NAME}.')[2]}", Whole(tensor))
        elif isinstance(tokens := getattr(layer, "token_adapter", layer), TrainableTokensLayer):
            first = tokens.tied_adapter or tokens  # a head that is tied does as the embeddings do
            state = next(self._states[key] for key, other in self._layers.items() if first in other.modules())
            rows = next(tensor for key, tensor in state.items() if TOKENS in key)
            self._add(f"{name}.weight", Rows(torch.tensor(first.token_indices[NAME]), rows))
        elif type(layer) in (Linear, Embedding) and NAME not in layer.lora_variant:
            self._add(f"{name}.weight", _product(layer, state))
            if layer.lora_bias[NAME]:
                if f"{name}.bias" not in self._parameters:
                    raise ValueError(f"lora_bias trained a bias of {name}, and the model has no place for it")
                self._add(f"{name}.bias", Sum(state[f"lora_B.{NAME}.bias"].float(), layer.scaling[NAME]))
        else:
            state = state | self._shared(layer)
            floats = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
            for parameter in self._ruled(name, layer):
                adds = self._kind in ADDING or isinstance(layer, ParamWrapper)
                kind = "DoRA" if getattr(self._config, "use_dora", False) else self._kind
                self._add(f"{name}.{parameter}", Rule(layer, floats, parameter, kind, adds))

    def _shared(self, layer: Any) -> State:
        """Return what a layer needs that is the model's, by its names in it."""
        there = self._model.state_dict(keep_vars=True)
        shared = {id(there[key]): tensor for key, tensor in self._tensors.items() if key in there}
        own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        return {key: shared[id(tensor)] for key, tensor in own.items() if id(tensor) in shared}

    def _ruled(self, name: str, layer: Any) -> list[str]:
        """Return the parameters of a layer of the base that a layer of PEFT has a rule for."""
        if isinstance(layer, ParamWrapper):
            names = []
            while isinstance(layer, ParamWrapper):
                names.append(layer.parameter_name)
                layer = layer.base_layer
            return names
        has_bias = f"{name}.bias" in self._parameters
        if self._kind == "GLORA" and has_bias:
            raise ValueError(f"GLORA changes the bias of {name} by its weight, which is not merged")
        if self._kind == "BEFT" and not has_bias:
            raise ValueError(f"BEFT trained a bias of {name}, and the model has no place for it")
        of_bias = self._kind in BIASES and has_bias and not getattr(layer, "is_feedforward", False)
        return [*["weight"] * (self._kind != "BEFT"), *["bias"] * of_bias]


def put_on(model: Any, config: Any, adapter: str = NAME) -> PeftModel:
    """Return a base on the meta device with an adapter, or one more, of a configuration."""
    config.inference_mode = True
    if getattr(config, "init_lora_weights", None) not in (None, "mica"):
        config.init_lora_weights = True  # what it began with is in the file
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    require_cheap_matching(bare, config)
    ranks: dict[str, list[bool]] = {}
    if config.peft_type == PeftType.ADALORA:  # the ranks after training, which PEFT gives to layers with weights alone
        ranks, config.rank_pattern = config.rank_pattern or {}, None
    if isinstance(model, PeftModel):
        model.add_adapter(adapter, config, low_cpu_mem_usage=True)
    else:
        model = PeftModel(model, config, adapter, low_cpu_mem_usage=True)
    for name, kept in ranks.items():
        layer: Any = bare.get_submodule(name.replace(f".{NAME}", "").rpartition(".")[0])
        layer.update_layer(adapter, sum(kept), config.lora_alpha, config=config)
    return model


def embedding_names(model: Any) -> set[str]:
    """Return the names of the weights of embeddings and head, of which two may be one."""
    there = [part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if any(parameter is weight for weight in there)}


def _as_saved(tensors: State) -> State:
    """Return the tensors of an adapter without what PEFT saves twice beside embeddings that were resized."""
    first = {name for name in tensors if ".modules_to_save." not in name and ".original_module." not in name}
    named = {name.replace(".modules_to_save.", "."): tensor for name, tensor in tensors.items()}
    return {
        name: tensor if name not in first else tensors[name]
        for name, tensor in named.items()
        if ".original_module." not in name
    }


def _resize(bare: Any, tensors: State) -> None:
    """Give a base the vocabulary of the embeddings that are kept beside an adapter, if they are."""
    embeddings, rows = embedding_names(bare), bare.get_input_embeddings().weight.shape[0]
    kept = {len(tensor) for name, tensor in _as_saved(tensors).items() if _in_base(name) in embeddings}
    if len(kept) > 1:
        raise ValueError(f"its embeddings and its head are for {' and '.join(map(str, sorted(kept)))} tokens")
    if kept and kept != {rows}:
        bare.resize_token_embeddings(kept.pop(), mean_resizing=False)


def _product(layer: Any, state: State) -> Product:
    """Return the change of a layer of plain LoRA; the weights of embeddings and of GPT-2's layers are transposed."""
    if isinstance(layer, Embedding):
        a, b = state[f"lora_embedding_A.{NAME}"], state[f"lora_embedding_B.{NAME}"]
    else:
        a, b = state[f"lora_A.{NAME}.weight"], state[f"lora_B.{NAME}.weight"]
    transposed = isinstance(layer, Embedding) or layer.fan_in_fan_out
    left, right = (a.T, b.T) if transposed else (b, a)
    return Product(left.float(), right.float(), layer.scaling[NAME])


def _outermost(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield what PEFT has put in the place of layers of a base, by their names."""
    inside = "\n"
    for name, part in model.named_modules():
        if not name.startswith(inside) and isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside = f"{name}."
            yield name, part


def _by_layer(tensors: State, layers: Collection[str]) -> dict[str, State]:
    """Return the tensors of each layer by their names in it."""
    found: dict[str, State] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(PREFIX).split(".")
        for end in range(len(parts) - 1, 0, -1):
            if (layer := ".".join(parts[:end])) in layers:
                found.setdefault(layer, {})[".".join(parts[end:])] = tensor
                break
    return found


def as_loaded(model: Any, tensors: State, adapter: str = NAME) -> State:
    """Return the tensors of an adapter's file by the names that PEFT loads them under, with those it does not save."""
    found: State = {}

    def keep(state: State, **_: Any) -> _IncompatibleKeys:
        found.update(state)
        return _IncompatibleKeys([], [])

    layers = dict(_outermost(model.get_base_model()))
    twice = {f"{PREFIX}{name}.token_adapter.{TOKENS}" for name, layer in layers.items() if _is_tied(layer)}
    model.load_state_dict = keep
    try:
        kept = {name: tensor for name, tensor in _as_saved(tensors).items() if name not in twice}
        set_peft_model_state_dict(model, kept, adapter)
    finally:
        del model.load_state_dict
    for name, layer in layers.items():
        if adapter in getattr(layer, "ranknum", ()):  # of AdaLoRA: the rank that it began with
            found[f"{PREFIX}{name}.ranknum.{adapter}"] = torch.tensor([float(model.peft_config[adapter].init_r)])
    return found


def _is_tied(layer: Any) -> bool:
    """Return whether the trained tokens of a layer are those of another one."""
    return getattr(getattr(layer, "token_adapter", None), "tied_adapter", None) is not None


def _in_base(name: str) -> str:
    """Return the name in the base of what PEFT has as the base of a layer."""
    return name.removeprefix(PREFIX).replace(".token_adapter.base_layer", "").replace(".base_layer", "")


def _short(name: str) -> str:
    """Return the name that a tensor has in the file of an adapter."""
    return name.replace(f".{NAME}", "")


@contextmanager
def _one_line(pair: str) -> Iterator[None]:
    """Within this context PEFT is silent, and its errors are AdapterErrors of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AttributeError) as error:
        if isinstance(error, AdapterError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{pair}: the adapter does not fit this base model ({reason})") from None
