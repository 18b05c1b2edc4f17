"""The LoRA adapter on a base model: attach a fresh one, load a saved one, and give out what is to be saved.

Every adapter that is loaded goes through `set_state`, which accepts exactly the tensors that the base model
has a place for: nothing is dropped, and nothing stays at its initial value in silence. `read` and `check_fit` find
out before the base is loaded.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import AdapterError, ConfigError
from lora_alpaca.models.lora import (
    CONFIG,
    PICKLE,
    WEIGHTS,
    State,
    require_same_tensors,
    set_state,
    with_lora,
)
from lora_alpaca.models.weights import weights_damage
from lora_alpaca.storage.paths import user_path

# ---------------------------------------------------------------------------------------------- what was saved before


def check_folder(flag: str, folder: Path) -> None:
    """Raise AdapterError, naming a flag, where a folder holds no adapter."""
    if (folder / CONFIG).is_file():
        return
    reason = f"{CONFIG} is missing" if folder.exists() else "no such folder"
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
    path = folder / CONFIG
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
    if reason := weights_damage(path):
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


def check_fit(bare: Any, folder: Path, tensors: State, pair: str) -> None:
    """Raise AdapterError unless the tensors of a folder are exactly those it would have on `bare`, a base on meta.

    `pair` names adapter and base.
    """
    with torch.device("meta"):
        own = get_peft_model_state_dict(_dressed(bare, folder, pair), save_embedding_layers=False)
    require_same_tensors(own, tensors, pair)


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
        return with_lora(model, lora)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{where}: the adapter does not fit this base model ({str(error).splitlines()[0]})"
        ) from None


def download(hub_id: str, flag: str = "--lora_weights", weights: str = WEIGHTS) -> Path:
    """Return the local copy of an adapter on the hub, downloaded if it is not there yet. Raises AdapterError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", weights, "tokenizer*"]))
    except Exception as error:  # the hub's many errors have no common base
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterError(f"{flag} {hub_id}: no such folder, and the hub gives none ({reason})") from None
