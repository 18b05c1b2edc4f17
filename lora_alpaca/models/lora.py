"""The LoRA adapter on a live model: attached, read out and put back. The one home of PEFT."""

import warnings
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import AdapterError, ModelError
from lora_alpaca.models.base import Base
from lora_alpaca.models.meta import is_linear
from lora_alpaca.models.trainable import State

PICKLE = "adapter_model.bin"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the names that PEFT reads


def attach(model: Any, config: FinetuneConfig, base: Base) -> PeftModel:
    """Return the model with a fresh, trainable LoRA adapter (B is zero), its parameters in fp32.

    Raises ModelError listing what the model has, where a target module is not among it.
    """
    targets = target_modules(model, config)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.path,
        revision=base.revision,
    )
    return with_lora(model, lora)


def with_lora(model: Any, lora: LoraConfig) -> PeftModel:
    conv1d = transformers.pytorch_utils.Conv1D  # GPT-2's layers: their weight is transposed, unless quantised
    lora.fan_in_fan_out = any(isinstance(part, conv1d) for part in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers has renamed
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*renamed")  # its path on this machine
        peft_model = get_peft_model(model, lora)
    peft_model.active_peft_config.revision = lora.revision
    assert isinstance(peft_model, PeftModel)
    return peft_model


def _linear_names(model: Any) -> list[str]:
    """Return the last name parts of all linear layers but the head: what an adapter can be put on."""
    head = model.get_output_embeddings()
    return sorted(
        {name.rpartition(".")[2] for name, part in model.named_modules() if is_linear(part) and part is not head}
    )


def target_modules(model: Any, config: FinetuneConfig) -> list[str] | str:
    """Return the modules of a model that get an adapter; ModelError where one is not there."""
    there = _linear_names(model)
    asked = config.lora_target_modules
    if asked == ["all-linear"]:
        return "all-linear"
    if not config.is_set("lora_target_modules") and not set(asked) <= set(there):
        known = PEFT_TARGETS.get(model.config.model_type)
        asked = [known] if isinstance(known, str) else list(known or asked)
        if isinstance(known, str):  # a regular expression over full names
            return known
    missing = [name for name in asked if name.rpartition(".")[2] not in there]
    if missing:
        raise ModelError(
            f"--lora_target_modules {','.join(missing)}: the model has no such module; it has {', '.join(there)}"
        )
    return asked


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


def normalized(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Return settings that an earlier PEFT wrote as this one writes them. Raises AdapterError for unknown ones."""
    try:
        return _as_json(LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{where}: {str(error).splitlines()[0]}") from None


def set_state(model: PeftModel, tensors: State, where: str) -> None:
    """Put tensors into the adapter of a model; AdapterError unless names and shapes are exactly the adapter's own."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    require_same_tensors(own, tensors, where)
    set_peft_model_state_dict(model, tensors)


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
