"""The LoRA adapter on a base model: attach a fresh one, load a saved one, and give out what is to be saved.

Every adapter that is loaded goes through `set_state`, which accepts exactly the tensors that the base model
has a place for: nothing is dropped, and nothing stays at its initial value in silence. `read` and `check_fit` find
out before the base is loaded.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors.torch import load_file

from lora_alpaca import models
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import AdapterError, ConfigError, ModelError
from lora_alpaca.models import Base
from lora_alpaca.skeletons import is_linear
from lora_alpaca.storage.paths import user_path

PICKLE = "adapter_model.bin"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # the names that PEFT reads
State = dict[str, torch.Tensor]


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
    return sorted(
        {name.rpartition(".")[2] for name, part in model.named_modules() if is_linear(part) and part is not head}
    )


def target_modules(model: Any, config: FinetuneConfig) -> list[str] | str:
    """Return the modules of a model, or of its skeleton, that get an adapter; ModelError where one is not there."""
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


def settings(model: PeftModel) -> dict[str, Any]:
    """Return what PEFT reads from adapter_config.json, in an order that does not change from run to run."""
    return _written(model.active_peft_config)


def _written(lora: Any) -> dict[str, Any]:
    facts = lora.to_dict() | {"inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(facts.items())}


def as_today(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """Return settings that an earlier PEFT wrote as this one writes them. Raises AdapterError for unknown ones."""
    try:
        return _written(LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{where}: {str(error).splitlines()[0]}") from None


# ---------------------------------------------------------------------------------------------- what was saved before


def check_folder(flag: str, folder: Path) -> None:
    """Raise AdapterError, naming a flag, where a folder holds no adapter."""
    if (folder / SETTINGS).is_file():
        return
    reason = f"{SETTINGS} is missing" if folder.exists() else "no such folder"
    if (folder / "config.json").is_file():
        reason = "it is a model; name it with --base_model"
    raise AdapterError(f"{flag} {folder}: no adapter there ({reason})")


def check_start(config: FinetuneConfig) -> None:
    """Raise AdapterError if --init_adapter holds no adapter, ConfigError if it is not of the shape that was said."""
    folder = user_path(config.init_adapter or "")
    check_folder("--init_adapter", folder)
    saved = read_settings(folder)
    options = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    for option, key in options.items():
        if config.is_set(option) and getattr(config, option) != saved.get(key):
            raise ConfigError(f"--{option} {getattr(config, option)}: --init_adapter {folder} has {saved.get(key)}")
    has = [saved["target_modules"]] if isinstance(saved["target_modules"], str) else saved["target_modules"]
    if config.is_set("lora_target_modules") and set(config.lora_target_modules) != set(has):
        asked = ",".join(config.lora_target_modules)
        raise ConfigError(f"--lora_target_modules {asked}: --init_adapter has {','.join(has)}")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json. Raises AdapterError unless it describes a LoRA adapter."""
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read ({error}); copy or download it again") from None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise AdapterError(f"{path}: describes no LoRA adapter (peft_type is {kind}); only LoRA is loaded")
    rank, alpha, targets = (found.get(key) for key in ("r", "lora_alpha", "target_modules"))
    sound = {
        "r": isinstance(rank, int) and rank > 0,
        "lora_alpha": isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0,
        "target_modules": bool(targets) and isinstance(targets, (str, list)),
    }
    for key in (key for key, good in sound.items() if not good):
        raise AdapterError(f"{path}: {key} is {found.get(key)!r}; the file is damaged, or was not written by PEFT")
    return found


def read(folder: Path, may_do_nothing: bool = False) -> State:
    """Return the tensors of an adapter folder.

    Raises AdapterError for a file that is missing, cut short or not finite, and, unless it may, for an adapter that
    changes nothing.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = f"; {PICKLE} is a pickle, which is not loaded: lora-alpaca convert_adapter {folder} NEW"
        raise AdapterError(f"{folder}: {WEIGHTS} is missing" + pickled * (folder / PICKLE).is_file())
    if reason := models.damage(path):
        raise AdapterError(f"{path} {reason}")
    tensors = load_file(path)
    check_tensors(tensors, str(path), may_do_nothing)
    return tensors


def check_tensors(tensors: State, where: str, may_do_nothing: bool = False) -> None:
    """Raise AdapterError for no tensors, for NaN or infinity, and for an adapter whose every B is zero."""
    if not tensors:
        raise AdapterError(f"{where}: holds no tensors; it is an empty adapter")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{where}: {name} holds NaN or infinity")
    grown = [tensor for name, tensor in tensors.items() if not any(part in name for part in ("lora_A", "embedding_A"))]
    if not may_do_nothing and not any(tensor.any() for tensor in grown):
        raise AdapterError(f"{where}: the adapter changes nothing (every B is zero); it was never trained")


def check_fit(skeleton: Any, folder: Path, tensors: State, pair: str) -> None:
    """Raise AdapterError unless the tensors of a folder are exactly those that it would have on a base's skeleton.

    `pair` names adapter and base.
    """
    with torch.device("meta"):
        own = get_peft_model_state_dict(_dressed(skeleton, folder, pair), save_embedding_layers=False)
    _check_same(own, tensors, pair)


def load(model: Any, folder: Path, trainable: bool = False, dropout: float = 0.0) -> PeftModel:
    """Return the model with the adapter of a folder on it, to be trained with `dropout` if it is trainable.

    Raises AdapterError where not everything fits.
    """
    tensors = read(folder, may_do_nothing=True)
    peft_model = _dressed(model, folder, str(folder), trainable, dropout)
    set_state(peft_model, tensors, str(folder))
    return peft_model


def _dressed(model: Any, folder: Path, where: str, trainable: bool = False, dropout: float = 0.0) -> PeftModel:
    """Return a model with an adapter of the kind that a folder's settings describe, its tensors still its own."""
    read_settings(folder)
    try:
        lora = LoraConfig.from_pretrained(str(folder))
        lora.inference_mode = not trainable
        lora.lora_dropout = dropout
        return _with_adapter(model, lora)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{where}: the adapter does not fit this base model ({str(error).splitlines()[0]})"
        ) from None


def set_state(model: PeftModel, tensors: State, where: str) -> None:
    """Put tensors into the adapter of a model; AdapterError unless names and shapes are exactly the adapter's own."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_same(own, tensors, where)
    set_peft_model_state_dict(model, tensors)


def _check_same(own: State, tensors: State, where: str) -> None:
    """Raise AdapterError at the first tensor whose name or shape is not the adapter's own."""
    for name in sorted(own.keys() ^ tensors.keys()):
        raise AdapterError(
            f"{where}: {name} is {'missing' if name in own else 'not part of this base model'}; wrong base model?"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise AdapterError(f"{where}: {name} is {list(tensor.shape)}, the base model needs {list(own[name].shape)}")


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that training moves, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layers(model: PeftModel) -> list[LoraLayer]:
    """Return the layers that carry an adapter."""
    return [part for part in model.modules() if isinstance(part, LoraLayer)]


def download(hub_id: str, flag: str = "--lora_weights", weights: str = WEIGHTS) -> Path:
    """Return the local copy of an adapter on the hub, downloaded if it is not there yet. Raises AdapterError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", weights, "tokenizer*"]))
    except Exception as error:  # the hub's many errors have no common base
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterError(f"{flag} {hub_id}: no such folder, and the hub gives none ({reason})") from None
