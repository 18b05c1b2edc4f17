"""The folder of an adapter: read, checked against its base, loaded, and saved."""

import hashlib
import math
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.models import quick_import  # noqa: F401  before PEFT

# isort: split
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from lora_alpaca.artifacts import adapter_settings, checkpoint, privacy, prompt_contract, tokenizer_files
from lora_alpaca.artifacts.prompt_contract import PromptContract
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import AdapterError, ConfigError, first_line
from lora_alpaca.models import quantization
from lora_alpaca.models.adapter_kinds import require_same_base
from lora_alpaca.models.adapter_layers import AdapterLayers
from lora_alpaca.models.base import Base
from lora_alpaca.models.fingerprint import hash_base
from lora_alpaca.models.lora import (
    CONFIG,
    PICKLE,
    WEIGHTS,
    peft_kinds,
    require_same_tensors,
    set_state,
    with_lora,
)
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.trainable import State
from lora_alpaca.models.weights import as_safetensors, load_tensors
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.json_files import Shape, require_object
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import files_below, sha256, user_path

# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter folder, or the folder of a merged model, records about itself.

    `contract` and the hashes are None if nothing was recorded: `base_sha256` is the hash of the base's config and
    weights, `adapter_sha256` that of the adapter's file. `settings` are those of its `adapter_config.json` that have an
    effect, and `settings_sha256` their hash.
    """

    base_model: str
    base_revision: str | None
    contract: PromptContract | None
    base_sha256: str | None = None
    adapter_sha256: str | None = None
    settings: dict[str, Any] | None = None
    settings_sha256: str | None = None
    checkpoint: bool = False  # whether the folder is a checkpoint of a run of ours, and every file of it whole
    base_stored_as: str | None = None  # the kind of quantisation that the base's files are stored in
    base_is_local: bool = False  # whether the base is a folder; its path is known on the machine of the run alone


class Recorded(Shape):
    """What the record of an adapter or of a merged model has that is read here."""

    status: str
    base_model: str
    base_revision: str | None
    base_sha256: str | None = None
    adapter_sha256: str | None = None
    adapter_settings: dict[str, Any] | None = None
    adapter_settings_sha256: str | None = None
    base_stored_as: str | None = None
    base_is_local: bool = False


def read_info(folder: Path) -> AdapterInfo:
    """Return the info of a folder of ours, or of a foreign adapter by PEFT's own file.

    Raises AdapterError for an adapter of an unfinished run, and for a damaged one.
    """
    if is_checkpoint := (folder / output_folder.MANIFEST).is_file() and (folder / checkpoint.STATE).is_file():
        if reason := checkpoint.verify(folder):
            raise AdapterError(f"{folder}: {reason}; take another checkpoint")
        where, record = folder / checkpoint.STATE, checkpoint.read_state(folder)["record"]
    elif (folder / output_folder.RECORD).is_file():
        where, record = folder / output_folder.RECORD, output_folder.read_record(folder)
        if not record:
            raise AdapterError(f"{where}: damaged; copy the folder again")
        record = privacy.whole(folder, record)
    else:
        settings = read_config(folder, any_kind=True)
        base = settings.get("base_model_name_or_path") or ""
        return AdapterInfo(
            base, settings.get("revision"), prompt_contract.read(folder), base_is_local=os.path.isabs(base)
        )
    Recorded.require(record, where, AdapterError, "copy the folder again")
    if record["status"] != "finished" and not is_checkpoint:
        raise AdapterError(
            f"{folder}: this run was never finished; go on with it: python finetune.py --resume --output_dir {folder}"
        )
    return AdapterInfo(
        record["base_model"],
        record["base_revision"],
        prompt_contract.read(folder),
        base_sha256=record.get("base_sha256"),
        adapter_sha256=record.get("adapter_sha256"),
        settings=record.get("adapter_settings"),
        settings_sha256=record.get("adapter_settings_sha256"),
        base_stored_as=record.get("base_stored_as"),
        checkpoint=is_checkpoint,
        base_is_local=record.get("base_is_local", os.path.isabs(record["base_model"])),
    )


def read_config(folder: Path, any_kind: bool = False) -> dict[str, Any]:
    """Return the content of adapter_config.json. Raises AdapterError unless it describes a LoRA adapter.

    With `any_kind`, it may describe any adapter of PEFT.
    """
    path = folder / CONFIG
    found = require_object(path, AdapterError, "copy or download it again")
    if found.get("megatron_config"):  # PEFT would import the module that the file names
        raise AdapterError(f"{path}: an adapter for Megatron, which names a module to import; it is not loaded")
    kind = found.get("peft_type")
    if any_kind and kind != "LORA" and isinstance(kind, str) and kind in peft_kinds():
        return found
    if kind != "LORA":
        raise AdapterError(f"{path}: describes no LoRA adapter (peft_type is {kind!s:.60}); only LoRA is loaded")
    rank, alpha = found.get("r"), found.get("lora_alpha")
    targets = found.get("target_modules") or found.get("target_parameters")
    sound = {
        "r": isinstance(rank, int) and rank > 0,
        "lora_alpha": isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha > 0,
        "target_modules": bool(targets) and isinstance(targets, (str, list)),
    }
    for key in (key for key, good in sound.items() if not good):
        raise AdapterError(f"{path}: {key} is {found.get(key)!r:.100}; the file is damaged, or was not written by PEFT")
    return found


def read_weights(folder: Path, may_do_nothing: bool = False) -> State:
    """Return the tensors of an adapter folder.

    Raises AdapterError for a file that is missing, cut short or not finite, and, unless `may_do_nothing`, for an
    adapter that changes nothing.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = f"; {PICKLE} is a pickle, which is not loaded: lora-alpaca convert_adapter {folder} NEW"
        raise AdapterError(f"{folder}: {WEIGHTS} is missing" + pickled * (folder / PICKLE).is_file())
    tensors = load_tensors(path, AdapterError)
    require_sound(tensors, str(path), may_do_nothing)
    return tensors


def download(hub_id: str, flag: str = "--lora_weights", weights: str = WEIGHTS) -> Path:
    """Return the local copy of an adapter on the hub, downloaded if there is none yet. Raises AdapterError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", weights, "tokenizer*"]))
    except Exception as error:  # the hub's many errors have no common base
        said = f"no such folder, and the hub gives none ({first_line(error)})"
        raise AdapterError(f"{flag} {hub_id}: {said}") from None


# ----------------------------------------------------------------------------------------------------------- checking

UNKNOWN_BASE = "warning: nothing records which base this adapter was trained on; only names and shapes are checked"


def require_adapter(flag: str, folder: Path) -> None:
    """Raise AdapterError, naming a flag, if a folder holds no adapter."""
    if (folder / CONFIG).is_file():
        return
    reason = f"{CONFIG} is missing" if folder.exists() else "no such folder"
    if (folder / "config.json").is_file():
        reason = "it is a model; name it with --base_model"
    raise AdapterError(f"{flag} {folder}: no adapter there ({reason})")


def check_init_adapter(config: FinetuneConfig) -> None:
    """Raise AdapterError if --init_adapter holds no adapter, ConfigError if flags contradict its config."""
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


def require_sound(tensors: State, where: str, may_do_nothing: bool = False) -> None:
    """Raise AdapterError for no tensors, for NaN or infinity, and for a LoRA adapter whose every B is zero."""
    if not tensors:
        raise AdapterError(f"{where}: holds no tensors; it is an empty adapter")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{where}: {name} holds NaN or infinity")
    trained = [tensor for name, tensor in tensors.items() if "lora_A" not in name and "embedding_A" not in name]
    if not may_do_nothing and not any(tensor.any() for tensor in trained):
        raise AdapterError(f"{where}: the adapter changes nothing (every B is zero); it was never trained")


def verify(folder: Path, info: AdapterInfo, base: Base, merging: bool = False) -> list[str]:
    """Return notes on what could not be checked. Raises AdapterError unless the adapter fits the base.

    An adapter fits if its files are whole, finite and as they were saved, if it changes something, which only a
    checkpoint need not, and if its tensors are those of this base, and the base's weights those it was trained on.
    For `merging`, it may be of any kind that is merged.
    """
    settings = read_config(folder, any_kind=merging)
    if info.settings_sha256 is not None:
        adapter_settings.require_same(settings, info.settings or {}, info.settings_sha256, folder / CONFIG)
    tensors = read_weights(folder, may_do_nothing=info.checkpoint)
    if info.adapter_sha256 not in (None, sha256(folder / WEIGHTS)):
        raise AdapterError(f"{folder / WEIGHTS}: not as it was saved (its sha256 is another); copy it again")
    if (bare := meta_model(base)) is not None:
        pair = f"{folder}, made for {info.base_model}, on {base.name}"
        AdapterLayers(bare, folder, tensors, pair) if merging else _require_fit(bare, folder, tensors, pair)
    notes = adapter_settings.unknown(settings, folder / CONFIG)
    if info.base_sha256 is None:
        return [*notes, UNKNOWN_BASE]
    if info.base_stored_as and quantization.stored(base.config) is None:
        return [
            *notes,
            f"warning: {info.base_model}, the base of training, is stored as {info.base_stored_as}: the weights of "
            f"{base.name} cannot be compared with it by a hash, names and shapes are",
        ]
    if info.base_sha256 != hash_base(base):
        raise AdapterError(
            f"{folder} was trained on {info.base_model}, and the weights of {base.name} are others; name that base"
        )
    return notes


def _require_fit(bare: Any, folder: Path, tensors: State, pair: str) -> None:
    """Raise AdapterError unless the tensors of a folder are those that its adapter has on `bare`, a base on meta.

    `pair` names adapter and base.
    """
    with torch.device("meta"):
        own = get_peft_model_state_dict(_with_saved_lora(bare, folder, pair), save_embedding_layers=False)
    require_same_tensors(own, tensors, pair)


# ------------------------------------------------------------------------------------------------------------ loading


def load(model: Any, folder: Path, trainable: bool = False, dropout: float = 0.0) -> PeftModel:
    """Return the model with the adapter of a folder on it, to be trained with `dropout` if it is trainable.

    Raises AdapterError unless every tensor fits.
    """
    tensors = read_weights(folder, may_do_nothing=True)
    peft_model = _with_saved_lora(model, folder, str(folder), trainable, dropout)
    set_state(peft_model, tensors, str(folder))
    return peft_model


def load_another(peft_model: PeftModel, folder: Path, name: str) -> None:
    """Put the adapter of a folder on a model that has one, by another name. Raises AdapterError as `load` does."""
    tensors = read_weights(folder, may_do_nothing=True)
    _with_saved_lora(peft_model, folder, str(folder), name=name)
    set_state(peft_model, tensors, str(folder), name)


def _with_saved_lora(
    model: Any, folder: Path, where: str, trainable: bool = False, dropout: float = 0.0, name: str = "default"
) -> PeftModel:
    """Return the model with a fresh adapter, or one more, of the configuration that a folder holds."""
    read_config(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # `verify` tells
            lora = LoraConfig.from_pretrained(str(folder))
        require_same_base(lora, folder)
        lora.inference_mode = not trainable
        lora.lora_dropout = dropout
        return with_lora(model, lora, name)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{where}: the adapter does not fit this base model ({str(error).splitlines()[0]})"
        ) from None


# ------------------------------------------------------------------------------------------------------------- saving


@dataclass(frozen=True)
class TrainedAdapter:
    """What the folder of a trained adapter holds: tensors, PEFT's config, tokenizer, prompt contract and record.

    The files of the tokenizer are those of the base where nobody changed it, and its chat template is the template.
    """

    state: State
    peft_config: dict[str, Any]
    base: Base
    tokenizer: Any
    template: AnyTemplate
    contract: dict[str, Any]
    record: dict[str, Any]


def save(output_dir: Path, adapter: TrainedAdapter, run: RunResult) -> None:
    """Write a trained adapter into a folder, and the record, now that of a finished run, last. Raises OSError.

    All files are written and flushed in a staging folder first, and then appear one by one, each whole.
    """
    record = privacy.published(adapter.record)
    peft_config = adapter.peft_config | {"base_model_name_or_path": record["base_model"]}
    settings = adapter_settings.effective(peft_config)
    with atomic.rust_errors_as_oserror(), atomic.staging_folder(output_dir / "final") as stage:
        tokenizer_files.write(stage, adapter.base, adapter.tokenizer, adapter.template)
        atomic.write(stage / CONFIG, atomic.as_json(peft_config))
        atomic.write(stage / privacy.FILE, atomic.as_json(privacy.private(adapter.record)))
        atomic.write(stage / prompt_contract.FILE, atomic.as_json(adapter.contract))
        weights = as_safetensors(adapter.state)
        atomic.write(stage / WEIGHTS, weights)
        atomic.fsync_tree(stage)
        files = files_below(stage)
        atomic.move_into(output_dir, stage, files)
    result = {key: value for key, value in asdict(run).items() if key != "output_dir"}
    finished = {
        "status": "finished",
        "adapter_sha256": hashlib.sha256(weights).hexdigest(),
        "adapter_settings": settings,
        "adapter_settings_sha256": adapter_settings.digest(settings),
        "files": files,
        "result": result,
    }
    OutputFolder(output_dir).write_record(record | finished)
