"""Output folders: whose they are, what may be done to them, and the one place that writes into them.

A folder of ours carries a record, `lora_alpaca.json`: what it holds, whether it is finished, and which files are ours.
Nothing else is ever removed or written over.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as tensors_to_bytes

from lora_alpaca.errors import FolderError

RECORD = "lora_alpaca.json"
CHECKPOINT_FILES = "manifest.json"  # in every checkpoint: its files with sizes and hashes
Standing = Literal["free", "finished", "unfinished", "foreign"]


# --------------------------------------------------------------------------------------------------------- writing


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole: beside its place, flushed to the disk, then renamed into it."""
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors; the mark "pt" is what transformers and PEFT look for."""
    write_bytes(path, tensors_to_bytes(dict(tensors), metadata={"format": "pt"}))


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Return all files of a folder as sorted relative paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------- ownership


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, or an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder of ours, or an empty one."""
    record = read_json(folder / RECORD)
    return record if "status" in record else {}


def standing(folder: Path) -> Standing:
    """Return whether a folder is free to use, a finished or an unfinished one of ours, or somebody else's."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return "free"
    record = read_record(folder) if folder.is_dir() else {}
    return "foreign" if not record else "finished" if record["status"] == "finished" else "unfinished"


def check(folder: Path, overwrite: bool, ways_on: str) -> None:
    """Raise FolderError where a folder must not be written to; `ways_on` says what to do about an unfinished one."""
    found = standing(folder)
    if found == "foreign":
        what = "is not a folder" if not folder.is_dir() else "is not empty and was not made by lora_alpaca"
        raise FolderError(f"--output_dir {folder} {what}; name another folder")
    if found == "unfinished" and not overwrite:
        raise FolderError(f"--output_dir {folder} holds an unfinished run; {ways_on}")
    above = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not os.access(above, os.W_OK):
        raise FolderError(f"--output_dir {folder}: {above} is not writable; name another folder")


def claim(folder: Path, overwrite: bool) -> list[str]:
    """Make room in a checked folder, set aside a finished run or remove it, and return what was done in sentences."""
    said = []
    if standing(folder) != "free":
        if overwrite:
            remove_ours(folder)
            said.append(f"removed the earlier results in {folder}")
        else:
            said.append(f"{folder} holds finished results; they are now in {set_aside(folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    return said


def set_aside(folder: Path) -> Path:
    """Rename a folder to the first free of `name.1`, `name.2`, ... and return that."""
    folder = folder.resolve()
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


def remove_ours(folder: Path) -> None:
    """Remove the files that our records list, and then the folders that this leaves empty."""
    for listing in folder.glob(f"checkpoint-*/{CHECKPOINT_FILES}"):
        remove_checkpoint(listing.parent)
    for name in [*read_record(folder).get("files", []), RECORD]:
        (folder / name).unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: the files its manifest lists, and the folder if that was all."""
    manifest = read_json(folder / CHECKPOINT_FILES)
    if not {"step", "files"} <= manifest.keys():
        return  # a manifest, but not one of ours
    for name in [*manifest["files"], CHECKPOINT_FILES]:  # the manifest last: without it the rest would be nobody's
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def fresh_stage(folder: Path) -> Path:
    """Return a new, empty, hidden folder beside `folder`, to be filled and then renamed to it."""
    stage = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    return stage


def publish(stage: Path, folder: Path, overwrite: bool) -> list[str]:
    """Let a staged folder appear in its place and return what was done to make room. Nobody sees half of it."""
    said = claim(folder, overwrite)
    if any(folder.iterdir()):  # files of the user's own stay where they are, beside ours
        for path in stage.iterdir():
            os.replace(path, folder / path.name)
        stage.rmdir()
    else:
        folder.rmdir()
        os.replace(stage, folder)
    return said
