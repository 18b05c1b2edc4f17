"""Convert a base model whose weights are pickles to safetensors, without running code of a pickle.

Most models before 2023 exist as `pytorch_model.bin` only. Every file of weights becomes a file of safetensors, tensor
for tensor and bit for bit; it is mapped from the disk, so that memory holds one at a time at most. The small files of
the folder are copied, its code too, which stays a text: it runs where a user trusts the new folder as a base, and here
never.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_alpaca.config import ConvertBaseConfig
from lora_alpaca.errors import FolderError, ModelError, visible
from lora_alpaca.export.disk import require_space
from lora_alpaca.models.base import (
    INDEX,
    ONE_FILE,
    PICKLE,
    PICKLE_INDEX,
    Base,
    base_file,
    config_file,
    locate_base,
)
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.trainable import State
from lora_alpaca.models.weights import pickled_tensors, write_safetensors
from lora_alpaca.storage import atomic
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import user_path

COPIED = {".json", ".txt", ".model", ".bpe", ".tiktoken", ".jinja", ".md", ".py"}  # and names without an ending
LEFT = {PICKLE_INDEX, "lora_alpaca.json", "lora_alpaca.private.json"}
ON_THE_HUB = (  # what a base may have beside its weights; none of it but config.json must be there
    "added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


@dataclass
class _Written:
    """What was written: tensors with their files, their bytes, and how many are left to the one they are tied to."""

    files: dict[str, str]
    size: int = 0
    tied: int = 0


def convert_base(config: ConvertBaseConfig) -> Path:
    """Write the base of an old folder to a new folder, its weights as safetensors, and return the new folder.

    Raises ModelError for a file with more than tensors in it, or with fewer than its index names, and FolderError where
    the new folder exists already or its disk is full. Then nothing is written.
    """
    new = user_path(config.new)
    if new.exists() or new.is_symlink():
        raise FolderError(f"{new} is there already, and is not written over; name another folder")
    base = locate_base(config.old, config.revision, flag="OLD")
    pickles = _pickles(base)
    require_space(str(new), new, "the model", sum(path.stat().st_size for path in pickles))
    folder = OutputFolder(new)
    with folder.staging() as stage:
        written = _convert(base, pickles, stage)
        left = _copy(base, stage, {path.name for path in pickles})
        atomic.fsync_tree(stage)
        folder.publish(stage, overwrite=False)
    tied = f"; {written.tied} tied to another are left to it" if written.tied else ""
    print(f"{len(written.files)} tensors of {base.name} ({gigabytes(written.size)}) written to {new}{tied}")
    if left:
        print(f"not copied: {visible(', '.join(left))}")
    return new


def _pickles(base: Base) -> list[Path]:
    """Return the pickles of a base, downloaded if they are not here yet. Raises ModelError if there are none."""
    folder = config_file(base).parent
    if base_file(base, ONE_FILE, optional=True) or base_file(base, INDEX, optional=True):
        raise ModelError(f"OLD {base.name} has its safetensors already; there is nothing to convert")
    names = [PICKLE]
    if not (found := base_file(base, PICKLE)) and (index := base_file(base, PICKLE_INDEX)):
        names = sorted(set(_placed(index).values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".bin"):
                raise ModelError(f"{index}: names {name!r}, which is no file of weights beside it")
    paths = [found] if found else [base_file(base, name) for name in names]
    for name, path in zip(names, paths, strict=True):
        if path is None:
            raise ModelError(f"OLD {base.name}: {folder / name} is missing; there is nothing to convert")
    return [path for path in paths if path]


def _placed(index: Path) -> dict[str, str]:
    """Return tensor -> file by an index. Raises ModelError for one that says nothing."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ModelError(f"{index}: does not say which file has which tensor; copy or download it again")
    return found


def _convert(base: Base, pickles: list[Path], stage: Path) -> _Written:
    """Write every pickle as safetensors, and the index where there are several."""
    tied = _tied(base)
    written = _Written({})
    for path in pickles:
        try:
            found = pickled_tensors(path)
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from None
        tensors = dict(_without_twins(found, tied))
        written.tied += len(found) - len(tensors)
        name = ONE_FILE if len(pickles) == 1 else path.stem.replace("pytorch_model", "model") + ".safetensors"
        write_safetensors(tensors, stage / name)
        written.files |= dict.fromkeys(tensors, name)
        written.size += sum(tensor.nbytes for tensor in tensors.values())
    if len(pickles) > 1 or pickles[0].name != PICKLE:
        lost = _placed(pickles[0].with_name(PICKLE_INDEX)).keys() - written.files.keys() - tied
        if lost:
            raise ModelError(f"OLD {base.name}: no file has {min(lost)}, which {PICKLE_INDEX} names; copy it again")
    if len(pickles) > 1:
        index = {"metadata": {"total_size": written.size}, "weight_map": dict(sorted(written.files.items()))}
        atomic.write(stage / INDEX, atomic.as_json(index))
    return written


def _tied(base: Base) -> set[str]:
    """Return the tensors that the model takes from others, by their names, such as a head that is the embedding."""
    bare = meta_model(base)
    return set(getattr(bare, "all_tied_weights_keys", None) or {})


def _without_twins(tensors: State, tied: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors, but not those that the model ties to another of the same memory; each has memory of its own."""
    places = {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in tensors.items()}
    kept = {place for name, place in places.items() if name not in tied}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if name in tied and places[name] in kept:
            continue
        shared = (storage := tensor.untyped_storage().data_ptr()) in storages
        storages.add(storage)
        yield name, tensor.clone().contiguous() if shared else tensor.contiguous()


def _copy(base: Base, stage: Path, pickles: set[str]) -> list[str]:
    """Copy what lies beside the weights, and return the names of what is not copied; folders are not looked into."""
    for name in ON_THE_HUB:
        base_file(base, name, optional=True)  # which downloads it
    left = []
    for path in sorted(config_file(base).parent.iterdir()):
        if not path.is_file() or path.name in LEFT | pickles or path.name.startswith("."):
            continue
        if path.suffix not in COPIED and path.suffix:
            left.append(path.name)
            continue
        atomic.write(stage / path.name, path.read_bytes())
    return left
