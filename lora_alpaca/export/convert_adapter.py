"""An old adapter, whose weights are a pickle, to safetensors: tensors are read, and no code in the file is run.

alpaca-lora and PEFT before 0.7 wrote `adapter_model.bin`. Everything about it is checked before a file is written.
"""

import re
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.config import ConvertConfig
from lora_alpaca.errors import AdapterError, FolderError
from lora_alpaca.models import lora
from lora_alpaca.models.lora import CONFIG, PICKLE, WEIGHTS
from lora_alpaca.models.trainable import State
from lora_alpaca.models.weights import as_safetensors
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.paths import user_path

NAME = re.compile(
    r"(base_model\.model\.(?:.+\.)?([^.]+)\.)lora_(A|B)(?:\.default)?\.weight"
)  # .default: PEFT's inner name, which some have saved
LONG_GONE = ("enable_lora", "merge_weights")  # settings of PEFT 0.2, which must be off to mean the same today


def convert_adapter(config: ConvertConfig) -> Path:
    """Write the adapter of an old folder to a new one, as PEFT reads it today, and return that.

    Raises AdapterError for a file that holds more than tensors, or tensors that are not those of its settings, and
    FolderError where there is something at the new place; then nothing is written.
    """
    old, new = user_path(config.old), user_path(config.new)
    if new.exists() or new.is_symlink():
        raise FolderError(f"{new} is there already, and is not written over; name another folder")
    if not old.exists() and config.old.count("/") == 1 and not config.old.startswith((".", "~", "/")):
        old = adapter_folder.download(config.old, "OLD", PICKLE)
    old = old.parent if old.name == PICKLE else old
    adapter_folder.require_adapter("OLD", old)
    if (old / WEIGHTS).is_file():
        raise AdapterError(f"{old} has its {WEIGHTS} already; there is nothing to convert")
    settings = _settings(old)
    state = _named(read_tensors(old / PICKLE), str(old / PICKLE))
    adapter_folder.require_sound(state, str(old / PICKLE))
    _check_shapes(state, settings, str(old / PICKLE))

    with output_folder.staging_folder(new) as stage:
        atomic.write(stage / WEIGHTS, as_safetensors(state))
        atomic.write(stage / CONFIG, atomic.as_json(settings))
        atomic.fsync_tree(stage)
        output_folder.move_into_place(stage, new, overwrite=False)
    print(f"{len(state)} tensors of {old / PICKLE} written to {new}")
    return new


def read_tensors(path: Path) -> State:
    """Return the tensors of a file that torch.save wrote. Raises AdapterError for anything else that is in it."""
    if not path.is_file():
        raise AdapterError(f"{path.parent}: {PICKLE} is missing; there is nothing to convert")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or a malicious file makes of the reader
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterError(f"{path}: holds no plain tensors, or is damaged; not loaded ({reason:.100})") from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise AdapterError(f"{path}: holds something else than tensors by their names; not converted")
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def _settings(folder: Path) -> dict[str, Any]:
    """Return the settings of an old folder as PEFT writes them today; AdapterError where they mean something else."""
    old = adapter_folder.read_config(folder)
    for key in LONG_GONE:
        if old.get(key):
            raise AdapterError(f"{folder / CONFIG}: {key} is {old[key]}, which PEFT does not know any more")
    return lora.normalized({key: value for key, value in old.items() if key not in LONG_GONE}, str(folder / CONFIG))


def _named(tensors: State, where: str) -> State:
    """Return tensors under the names of today; AdapterError for one that is no part of a LoRA adapter."""
    named = {}
    for name, tensor in tensors.items():
        if not (found := NAME.fullmatch(name)):
            raise AdapterError(f"{where}: {name} is not the name of a LoRA tensor; not converted")
        named[f"{found[1]}lora_{found[3]}.weight"] = tensor
    if len(named) != len(tensors):
        raise AdapterError(f"{where}: holds a tensor twice, under two names; not converted")
    return named


def _check_shapes(state: State, settings: dict[str, Any], where: str) -> None:
    """Raise AdapterError unless there is an A [r, in] for every B [out, r], on the modules that the settings name."""
    rank, targets = settings["r"], settings["target_modules"]
    layers = {NAME.fullmatch(name)[1]: NAME.fullmatch(name)[2] for name in state}  # type: ignore[index]
    for layer in layers:
        for part, side in (("A", 0), ("B", 1)):
            tensor = state.get(f"{layer}lora_{part}.weight")
            if tensor is None:
                raise AdapterError(f"{where}: {layer}lora_{part}.weight is missing; the adapter is not whole")
            if tensor.ndim != 2 or tensor.shape[side] != rank:
                raise AdapterError(f"{where}: {layer}lora_{part}.weight is {list(tensor.shape)}, and r is {rank}")
    if isinstance(targets, list) and set(layers.values()) != {name.rpartition(".")[2] for name in targets}:
        raise AdapterError(
            f"{where}: tensors of {', '.join(sorted(set(layers.values())))}, and {CONFIG} names {', '.join(targets)}"
        )
