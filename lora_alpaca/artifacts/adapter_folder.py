"""The folder of an adapter: read, checked against its base, and saved."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from lora_alpaca.artifacts import checkpoint, prompt_contract
from lora_alpaca.artifacts.prompt_contract import PromptContract
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import AdapterError, ConfigError
from lora_alpaca.models import lora
from lora_alpaca.models.base import Base
from lora_alpaca.models.fingerprint import hash_base
from lora_alpaca.models.lora import (
    CONFIG,
    PICKLE,
    WEIGHTS,
    require_same_tensors,
    set_state,
    with_lora,
)
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.trainable import State
from lora_alpaca.models.weights import as_safetensors, weights_damage
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import files_below, read_json, sha256, user_path


def require_adapter(flag: str, folder: Path) -> None:
    """Raise AdapterError, naming a flag, where a folder holds no adapter."""
    if (folder / CONFIG).is_file():
        return
    reason = f"{CONFIG} is missing" if folder.exists() else "no such folder"
    if (folder / "config.json").is_file():
        reason = "it is a model; name it with --base_model"
    raise AdapterError(f"{flag} {folder}: no adapter there ({reason})")


def check_init_adapter(config: FinetuneConfig) -> None:
    """Raise AdapterError if --init_adapter holds no adapter, ConfigError if it is not of the shape that was said."""
    folder = user_path(config.init_adapter or "")
    require_adapter("--init_adapter", folder)
    saved = read_config(folder)
    options = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    for option, key in options.items():
        if config.is_set(option) and getattr(config, option) != saved.get(key):
            raise ConfigError(f"--{option} {getattr(config, option)}: --init_adapter {folder} has {saved.get(key)}")
    has = [saved["target_modules"]] if isinstance(saved["target_modules"], str) else saved["target_modules"]
    if config.is_set("lora_target_modules") and set(config.lora_target_modules) != set(has):
        asked = ",".join(config.lora_target_modules)
        raise ConfigError(f"--lora_target_modules {asked}: --init_adapter has {','.join(has)}")


def read_config(folder: Path) -> dict[str, Any]:
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


def read_weights(folder: Path, may_do_nothing: bool = False) -> State:
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
    require_sound(tensors, str(path), may_do_nothing)
    return tensors


def require_sound(tensors: State, where: str, may_do_nothing: bool = False) -> None:
    """Raise AdapterError for no tensors, for NaN or infinity, and for an adapter whose every B is zero."""
    if not tensors:
        raise AdapterError(f"{where}: holds no tensors; it is an empty adapter")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{where}: {name} holds NaN or infinity")
    grown = [tensor for name, tensor in tensors.items() if not any(part in name for part in ("lora_A", "embedding_A"))]
    if not may_do_nothing and not any(tensor.any() for tensor in grown):
        raise AdapterError(f"{where}: the adapter changes nothing (every B is zero); it was never trained")


def require_fit(bare: Any, folder: Path, tensors: State, pair: str) -> None:
    """Raise AdapterError unless the tensors of a folder are exactly those it would have on `bare`, a base on meta.

    `pair` names adapter and base.
    """
    with torch.device("meta"):
        own = get_peft_model_state_dict(_with_saved_lora(bare, folder, pair), save_embedding_layers=False)
    require_same_tensors(own, tensors, pair)


def load(model: Any, folder: Path, trainable: bool = False, dropout: float = 0.0) -> PeftModel:
    """Return the model with the adapter of a folder on it, to be trained with `dropout` if it is trainable.

    Raises AdapterError where not everything fits.
    """
    tensors = read_weights(folder, may_do_nothing=True)
    peft_model = _with_saved_lora(model, folder, str(folder), trainable, dropout)
    set_state(peft_model, tensors, str(folder))
    return peft_model


def _with_saved_lora(model: Any, folder: Path, where: str, trainable: bool = False, dropout: float = 0.0) -> PeftModel:
    """Return a model with an adapter of the kind that a folder's settings describe, its tensors still its own."""
    read_config(folder)
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


@dataclass(frozen=True)
class Adapter:
    """A trained adapter with all that belongs to it: what its folder holds."""

    state: State
    settings: dict[str, Any]
    tokenizer: Any
    contract: dict[str, Any]
    record: dict[str, Any]

    def save(self, output_dir: Path, run: RunResult) -> None:
        """Write PEFT's two files, tokenizer, prompt contract, and the record last, now finished. Raises OSError.

        All is written and flushed elsewhere first: files appear one by one, each whole, and count with the record.
        """
        with atomic.rust_errors_as_oserror(), atomic.staging_folder(output_dir / "final") as stage:
            self.tokenizer.save_pretrained(stage)
            atomic.write(stage / lora.CONFIG, atomic.as_json(self.settings))
            atomic.write(stage / prompt_contract.FILE, atomic.as_json(self.contract))
            weights = as_safetensors(self.state)
            atomic.write(stage / WEIGHTS, weights)
            atomic.fsync_tree(stage)
            files = files_below(stage)
            for name in files:
                (output_dir / name).parent.mkdir(exist_ok=True)
                atomic.rename(stage / name, output_dir / name)
        result = {key: value for key, value in asdict(run).items() if key != "output_dir"}
        finished = {"status": "finished", "adapter_sha256": hashlib.sha256(weights).hexdigest(), "files": files}
        OutputFolder(output_dir).write_record(self.record | finished | {"result": result})


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter, or a merged model, says about itself. `contract` is None where nothing was recorded.

    So are the hashes: of the base's files (see `fingerprints.py`), and of the adapter's own file.
    """

    base_model: str
    base_revision: str | None
    contract: PromptContract | None
    base_sha256: str | None = None
    adapter_sha256: str | None = None
    checkpoint: bool = False  # of a run of ours, every file of it as it was written


def read_info(folder: Path) -> AdapterInfo:
    """Return what a folder of ours records, or what PEFT's own file says of a foreign adapter.

    Raises AdapterError for an adapter that was never finished, and for one that is damaged.
    """
    if is_checkpoint := (folder / output_folder.MANIFEST).is_file() and (folder / checkpoint.STATE).is_file():
        if reason := checkpoint.verify(folder):
            raise AdapterError(f"{folder}: {reason}; take another checkpoint")
        record = read_json(folder / checkpoint.STATE)["record"]
    elif (folder / output_folder.RECORD).is_file():
        record = output_folder.read_record(folder)
        if not record:
            raise AdapterError(f"{folder / output_folder.RECORD}: damaged; copy the folder again")
    else:
        settings = read_config(folder)
        return AdapterInfo(
            settings.get("base_model_name_or_path") or "", settings.get("revision"), prompt_contract.read(folder)
        )
    if record["status"] != "finished" and not is_checkpoint:
        raise AdapterError(
            f"{folder}: this run was never finished; go on with it: python finetune.py --resume --output_dir {folder}"
        )
    hashes = (record.get("base_sha256"), record.get("adapter_sha256"))
    return AdapterInfo(
        record["base_model"], record["base_revision"], prompt_contract.read(folder), *hashes, is_checkpoint
    )


UNKNOWN_BASE = "warning: nothing records which base this adapter was trained on; only names and shapes are checked"


def verify(folder: Path, info: AdapterInfo, base: Base) -> list[str]:
    """Return what could not be checked, in sentences. Raises AdapterError unless an adapter can be put on a base.

    It is whole, finite, as it was saved and not a no-op, which only a checkpoint may be; and made for these weights.
    """
    tensors = read_weights(folder, may_do_nothing=info.checkpoint)
    if info.adapter_sha256 not in (None, sha256(folder / WEIGHTS)):
        raise AdapterError(f"{folder / WEIGHTS}: not as it was saved (its sha256 is another); copy it again")
    if (bare := meta_model(base)) is not None:
        require_fit(bare, folder, tensors, f"{folder}, made for {info.base_model}, on {base.name}")
    if info.base_sha256 is None:
        return [UNKNOWN_BASE]
    if info.base_sha256 != hash_base(base):
        raise AdapterError(
            f"{folder} was trained on {info.base_model}, and the weights of {base.name} are others; name that base"
        )
    return []
