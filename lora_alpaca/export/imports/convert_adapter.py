"""Convert an old adapter, whose weights are a pickle, to safetensors, without running code of the pickle.

alpaca-lora and PEFT before 0.7 wrote `adapter_model.bin`. The adapter is checked whole before a file is written.
"""

import re
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.config import ConvertConfig
from lora_alpaca.errors import AdapterError, FolderError
from lora_alpaca.models import lora
from lora_alpaca.models.lora import CONFIG, PICKLE, WEIGHTS
from lora_alpaca.models.trainable import State
from lora_alpaca.models.weights import as_safetensors, pickled_tensors
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import user_path

# `.default` is the name of an adapter inside PEFT, which some scripts have saved.
NAME = re.compile(r"(base_model\.model\.(?:.+\.)?([^.]+)\.)lora_(A|B)(?:\.default)?\.weight")
REMOVED_KEYS = ("enable_lora", "merge_weights")  # of PEFT 0.2's config; an adapter that uses them cannot be converted


def convert_adapter(config: ConvertConfig) -> Path:
    """Write the adapter of an old folder to a new folder, as PEFT reads it today, and return the new folder.

    Raises AdapterError for a file with more than tensors in it, or with other tensors than its config describes, and
    FolderError where the new folder exists already. Then nothing is written.
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
    peft_config = _normalized_config(old)
    state = _renamed(read_tensors(old / PICKLE), str(old / PICKLE))
    adapter_folder.require_sound(state, str(old / PICKLE))
    _verify_shapes(state, peft_config, str(old / PICKLE))

    folder = OutputFolder(new)
    with folder.staging() as stage:
        atomic.write(stage / WEIGHTS, as_safetensors(state))
        atomic.write(stage / CONFIG, atomic.as_json(peft_config))
        atomic.fsync_tree(stage)
        folder.publish(stage, overwrite=False)
    print(f"{len(state)} tensors of {old / PICKLE} written to {new}")
    return new


def read_tensors(path: Path) -> State:
    """Return the tensors of a file that torch.save wrote. Raises AdapterError for a file of anything else."""
    if not path.is_file():
        raise AdapterError(f"{path.parent}: {PICKLE} is missing; there is nothing to convert")
    try:
        found = pickled_tensors(path)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from None
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def _normalized_config(folder: Path) -> dict[str, Any]:
    """Return the adapter config of an old folder as PEFT writes it today.

    Raises AdapterError for a config that PEFT no longer understands.
    """
    old = adapter_folder.read_config(folder)
    for key in REMOVED_KEYS:
        if old.get(key):
            raise AdapterError(f"{folder / CONFIG}: {key} is {old[key]}, which PEFT does not know any more")
    return lora.normalized({key: value for key, value in old.items() if key not in REMOVED_KEYS}, str(folder / CONFIG))


def _renamed(tensors: State, where: str) -> State:
    """Return tensors under PEFT's names of today. Raises AdapterError for a tensor that no LoRA adapter has."""
    renamed = {}
    for name, tensor in tensors.items():
        if not (found := NAME.fullmatch(name)):
            raise AdapterError(f"{where}: {name} is not the name of a LoRA tensor; not converted")
        renamed[f"{found[1]}lora_{found[3]}.weight"] = tensor
    if len(renamed) != len(tensors):
        raise AdapterError(f"{where}: holds a tensor twice, under two names; not converted")
    return renamed


def _verify_shapes(state: State, peft_config: dict[str, Any], where: str) -> None:
    """Raise AdapterError unless each target module of the config, and no other, has an A [r, in] and a B [out, r]."""
    rank, targets = peft_config["r"], peft_config["target_modules"]
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
