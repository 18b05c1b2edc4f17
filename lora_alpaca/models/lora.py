"""The LoRA adapter on a live model: attached, read out and put back."""

import dataclasses
import warnings
from typing import Any

import torch
import transformers

from lora_alpaca.models import quick_import  # noqa: F401  before PEFT

# isort: split
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import AdapterError, ModelError
from lora_alpaca.models import targets
from lora_alpaca.models.base import Base
from lora_alpaca.models.layers import decoder_layers, last_layers
from lora_alpaca.models.trainable import State

PICKLE = "adapter_model.bin"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the names that PEFT reads
EXPRESSIONS = (
    "target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save",
)  # fmt: skip


def attach(model: Any, config: FinetuneConfig, base: Base) -> PeftModel:
    """Return the model with a fresh, trainable LoRA adapter (B is zero), its parameters in fp32.

    Raises ModelError listing what the model has, where a target module is not among it.
    """
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0 if config.lora_target_parameters else config.lora_dropout,
        **_where(model, config),
        target_parameters=targets.parameters(model, config.lora_target_parameters or []) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.path,
        revision=base.revision,
    )
    return with_lora(model, lora)


def with_lora(model: Any, lora: LoraConfig, name: str = "default") -> PeftModel:
    """Return the model with an adapter, or with one more if it is PEFT's already.

    Raises ValueError for one that PEFT refuses or would match for too long.
    """
    require_cheap_matching(model, lora)
    conv1d = transformers.pytorch_utils.Conv1D  # GPT-2's layers: their weight is transposed, unless quantised
    lora.fan_in_fan_out = any(isinstance(part, conv1d) for part in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers has renamed
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*renamed")  # its path on this machine
        if isinstance(model, PeftModel):
            model.add_adapter(name, lora)
            return model
        peft_model = get_peft_model(model, lora)
    peft_model.active_peft_config.revision = lora.revision
    assert isinstance(peft_model, PeftModel)
    return peft_model


def require_cheap_matching(model: Any, config: PeftConfig) -> None:
    """Raise ValueError for the configuration of an adapter whose expressions would be matched for too long."""
    targets.matches(_expressions(config), [name for name, _ in model.named_modules()])


def target_modules(model: Any, config: FinetuneConfig) -> list[str] | str:
    """Return the modules of a model that get an adapter, as PEFT takes them; ModelError where one is not there."""
    asked = config.lora_target_modules
    if asked == ["all-linear"]:
        return "all-linear"
    if not config.is_set("lora_target_modules") and not set(asked) <= set(targets.linear_names(model)):
        known = PEFT_TARGETS.get(model.config.model_type)
        asked = [known] if isinstance(known, str) else list(known or asked)
        if isinstance(known, str):  # a regular expression over full names
            return known
    return targets.resolve(model, asked)


def _where(model: Any, config: FinetuneConfig) -> dict[str, Any]:
    """Return which modules get an adapter, and of which layers, as PEFT takes them.

    Raises ModelError where a target module is not there, or in none of the layers that --layers names.
    """
    found = target_modules(model, config)
    if config.layers == "all":
        return {"target_modules": found}
    name, layers = decoder_layers(model)
    numbers = last_layers(config.layers, len(layers))
    if found == "all-linear":
        found = targets.linear_names(model)
    elif isinstance(found, str):  # PEFT takes an expression or numbers of layers
        (matched,) = targets.matches([found], [module for module, _ in model.named_modules()])
        found = [one for one in matched if one.startswith(tuple(f"{name}.{number}." for number in numbers))]
        if not found:
            asked = ",".join(config.lora_target_modules)
            raise ModelError(f"--lora_target_modules {asked}: matches nothing in --layers {config.layers}")
    pattern = name.rpartition(".")[2]
    return {"target_modules": found, "layers_to_transform": numbers, "layers_pattern": pattern}


def _expressions(config: PeftConfig) -> list[str]:
    """Return the regular expressions of an adapter's configuration, as PEFT matches them with names of modules."""
    has = {key: getattr(config, key, None) or [] for key in EXPRESSIONS}
    whole = [one for one in (has["target_modules"], has["exclude_modules"]) if isinstance(one, str)]
    layers = has["layers_pattern"]
    parts = [
        *has["rank_pattern"],
        *has["alpha_pattern"],
        *has["modules_to_save"],
        *([layers] if isinstance(layers, str) else layers),
    ]
    return [
        one
        for one in [*whole, *(rf"(.*\.)?({part})($|\..*)" for part in parts if targets.is_expression(part))]
        if targets.is_expression(one)
    ]


def state(model: PeftModel) -> State:
    """Return the adapter's tensors on the CPU, under the names that PEFT saves them by."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def peft_config(model: PeftModel) -> dict[str, Any]:
    """Return what PEFT reads from adapter_config.json, in an order that does not change from run to run."""
    return _as_json(model.active_peft_config)


def _as_json(lora: Any) -> dict[str, Any]:
    facts = lora.to_dict() | {"inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(facts.items())}


def peft_kinds() -> set[str]:
    """Return what an adapter_config.json may have as its `peft_type`."""
    return {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def known_settings(kind: str) -> set[str]:
    """Return the keys that PEFT knows in the adapter_config.json of a kind of adapter."""
    return {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}


def default_settings() -> dict[str, Any]:
    """Return what PEFT takes for the keys that the adapter_config.json of a LoRA adapter leaves out."""
    return dict(LoraConfig().to_dict())


def normalized(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Return settings that an earlier PEFT wrote as this one writes them. Raises AdapterError for unknown ones."""
    try:
        return _as_json(LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{where}: {str(error).splitlines()[0]}") from None


def set_state(model: PeftModel, tensors: State, where: str, name: str = "default") -> None:
    """Put tensors into an adapter of a model; AdapterError unless names and shapes are exactly the adapter's own."""
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    require_same_tensors(own, tensors, where)
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def require_same_tensors(own: State, tensors: State, where: str) -> None:
    """Raise AdapterError at the first tensor whose name or shape is not the adapter's own."""
    for name in sorted(own.keys() ^ tensors.keys()):
        raise AdapterError(
            f"{where}: {name} is {'missing' if name in own else 'not part of this base model'}; wrong base model?"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise AdapterError(f"{where}: {name} is {list(tensor.shape)}, the base model needs {list(own[name].shape)}")


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that training moves, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the layers that carry an adapter, by their names in the base."""
    return {name: part for name, part in model.get_base_model().named_modules() if isinstance(part, LoraLayer)}


class LoraAdapter:
    """The adapter of a PEFT model, as what is trained of it (see `Trainable`)."""

    def __init__(self, model: PeftModel):
        self.model = model
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters = trainable_parameters(model)

    def state(self) -> State:
        """Return the adapter's tensors on the CPU."""
        return state(self.model)

    def load_state(self, tensors: State, where: str) -> None:
        """Put tensors into the adapter; AdapterError unless names and shapes are exactly the adapter's own."""
        set_state(self.model, tensors, where)

    def config(self) -> dict[str, Any]:
        """Return the content of adapter_config.json."""
        return peft_config(self.model)
