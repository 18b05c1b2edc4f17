"""The LoRA adapter on a base model: attach a fresh one, load a saved one, and give out what is to be saved.

Every adapter that is loaded goes through `set_state`, which accepts exactly the tensors that the base model
has a place for: nothing is dropped, and nothing stays at its initial value in silence.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_alpaca import folders
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import AdapterError, ConfigError, ModelError
from lora_alpaca.models import Base
from lora_alpaca.options import user_path

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # the names that PEFT reads
State = dict[str, torch.Tensor]


def attach(model: Any, config: FinetuneConfig, base: Base) -> PeftModel:
    """Return the model with a fresh, trainable LoRA adapter (B is zero), its parameters in fp32.

    Raises ModelError listing what the model has, where a target module is not among it.
    """
    targets = _target_modules(model, config)
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
    return _with_adapter(model, lora)


def _with_adapter(model: Any, lora: LoraConfig) -> PeftModel:
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
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return sorted(
        {
            name.rpartition(".")[2]
            for name, part in model.named_modules()
            if isinstance(part, kinds) and part is not head
        }
    )


def _target_modules(model: Any, config: FinetuneConfig) -> list[str] | str:
    there = _linear_names(model)
    asked = config.lora_target_modules
    if asked == ["all-linear"]:
        return "all-linear"
    if not config.said("lora_target_modules") and not set(asked) <= set(there):
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


def settings(model: PeftModel) -> dict[str, Any]:
    """Return what PEFT reads from adapter_config.json, in an order that does not change from run to run."""
    facts = model.active_peft_config.to_dict() | {"inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(facts.items())}


def check_start(config: FinetuneConfig) -> None:
    """Raise AdapterError if --init_adapter holds no adapter, ConfigError if it is not of the shape that was said."""
    folder = user_path(config.init_adapter or "")
    if not (folder / SETTINGS).is_file():
        raise AdapterError(f"--init_adapter {folder}: no adapter there ({SETTINGS} is missing)")
    saved = folders.read_json(folder / SETTINGS)
    options = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    for option, key in options.items():
        if config.said(option) and getattr(config, option) != saved.get(key):
            raise ConfigError(f"--{option} {getattr(config, option)}: --init_adapter {folder} has {saved.get(key)}")
    if config.said("lora_target_modules") and set(config.lora_target_modules) != set(saved.get("target_modules", [])):
        has = ",".join(saved.get("target_modules", []))
        raise ConfigError(f"--lora_target_modules {','.join(config.lora_target_modules)}: --init_adapter has {has}")


def load(model: Any, folder: Path, trainable: bool = False, dropout: float = 0.0) -> PeftModel:
    """Return the model with the adapter of a folder on it, to be trained with `dropout` if it is trainable.

    Raises AdapterError where not everything fits.
    """
    if not (folder / SETTINGS).is_file():
        raise AdapterError(f"{folder}: no adapter there ({SETTINGS} is missing)")
    try:
        lora = LoraConfig.from_pretrained(str(folder))
        lora.inference_mode = not trainable
        lora.lora_dropout = dropout
        peft_model = _with_adapter(model, lora)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{folder}: the adapter does not fit this base model ({str(error).splitlines()[0]})"
        ) from None
    set_state(peft_model, read(folder), str(folder))
    return peft_model


def read(folder: Path) -> State:
    """Return the tensors of an adapter folder. Raises AdapterError for one that is missing, cut short or not finite."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise AdapterError(
            f"{folder}: {WEIGHTS} is missing" + ("; adapter_model.bin is a pickle, which is not loaded" * pickled)
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: cannot be read ({error})") from None
    if not tensors:
        raise AdapterError(f"{path}: holds no tensors; it is an empty adapter")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} holds NaN or infinity")
    return tensors


def set_state(model: PeftModel, tensors: State, where: str) -> None:
    """Put tensors into the adapter of a model; AdapterError unless names and shapes are exactly the adapter's own."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(own.keys() ^ tensors.keys()):
        raise AdapterError(
            f"{where}: {name} is {'missing' if name in own else 'not part of this base model'}; wrong base model?"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise AdapterError(f"{where}: {name} is {list(tensor.shape)}, the base model needs {list(own[name].shape)}")
    set_peft_model_state_dict(model, tensors)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that training moves, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layers(model: PeftModel) -> list[LoraLayer]:
    """Return the layers that carry an adapter."""
    return [part for part in model.modules() if isinstance(part, LoraLayer)]


def download(hub_id: str, revision: str | None = None) -> Path:
    """Return the local copy of an adapter on the hub, downloaded if it is not there yet. Raises AdapterError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors", "tokenizer*"])
        )
    except Exception as error:  # the hub's many errors have no common base
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterError(f"--lora_weights {hub_id}: no such folder, and the hub gives none ({reason})") from None
