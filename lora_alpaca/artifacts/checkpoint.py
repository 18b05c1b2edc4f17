"""Checkpoints: everything a run needs to go on as if it had never stopped, written whole or not at all.

checkpoint-200/
  adapter_model.safetensors, adapter_config.json   the adapter, as PEFT reads it
  optimizer.safetensors                            AdamW's moments, by parameter
  best.safetensors                                 the adapter with the best validation loss so far, if there is one
  state.json                                       step, plan, history, best loss, options
  manifest.json                                    the run, and size and sha256 of each of these

There is no random state in it: that of a step follows from seed, step and rank.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lora_alpaca.errors import CheckpointError, ConfigError, TrainingError
from lora_alpaca.models.lora import CONFIG, WEIGHTS
from lora_alpaca.models.trainable import State
from lora_alpaca.models.weights import as_safetensors
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.output_folder import MANIFEST
from lora_alpaca.storage.paths import files_below, read_json, sha256, user_path

OPTIMIZER, BEST, STATE = "optimizer.safetensors", "best.safetensors", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_REMAINS = re.compile(r"\.(checkpoint-\d+|final)\.(partial|removed)")  # of a save or a removal that was interrupted


@dataclass
class Checkpoint:
    """The contents of a checkpoint: tensors by group, and the facts that fit into JSON."""

    facts: dict[str, Any]
    weights: State
    optimizer: State
    best: State = field(default_factory=dict)


def save(output_dir: Path, run: str, checkpoint: Checkpoint, settings: dict[str, Any]) -> Path:
    """Write a checkpoint for `facts["step"]` of a run and return its folder. It appears by a rename, complete.

    Raises TrainingError, before anything is written, if a tensor in it is not finite, and OSError.
    """
    step = checkpoint.facts["step"]
    for name, tensor in (checkpoint.weights | checkpoint.optimizer).items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"step {step}: {name} is no longer finite, so no checkpoint is made of it; lower --learning_rate and "
                "go on from the one before with --resume --allow_change learning_rate"
            )
    contents = {
        WEIGHTS: as_safetensors(checkpoint.weights),
        CONFIG: atomic.as_json(settings),
        OPTIMIZER: as_safetensors(checkpoint.optimizer),
        STATE: atomic.as_json(checkpoint.facts),
    }
    if checkpoint.best:
        contents[BEST] = as_safetensors(checkpoint.best)
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    folder = output_dir / f"checkpoint-{step}"
    with atomic.staging_folder(folder) as stage:
        for name, data in contents.items():
            atomic.write(stage / name, data)
        atomic.write(stage / MANIFEST, atomic.as_json({"run": run, "step": step, "files": files}))
        atomic.fsync_tree(stage)
        if folder.exists():  # nothing that this run made: those were set aside when it went on
            output_folder.rename_aside(folder, "left")
        atomic.rename(stage, folder)
    return folder


def rotate(output_dir: Path, run: str, keep: int, spare: int | None = None) -> None:
    """Remove the oldest checkpoints of a run beyond `keep`, by step number, but not that of step `spare`.

    What could not be removed before is tried again. Raises OSError.
    """
    remove_leftovers(output_dir)
    ours = [folder for folder in _folders(output_dir) if _run(folder) == run]
    for folder in ours[keep:]:
        if _step(folder) != spare:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint. If that is interrupted, what is left does not look like one."""
    listed = read_json(folder / MANIFEST).get("files", {})
    if set(files_below(folder)) <= {*listed, MANIFEST}:
        hidden = folder.with_name(f".{folder.name}.removed")
        atomic.remove_tree(hidden)
        atomic.rename(folder, hidden)
        folder = hidden
    output_folder.remove_checkpoint(folder)  # a file of the user's own in it stays


def remove_leftovers(output_dir: Path) -> None:
    """Remove what saves and removals that were interrupted have left hidden in a folder of ours."""
    for path in output_dir.glob(".*"):
        if path.is_dir() and _REMAINS.fullmatch(path.name):
            atomic.remove_tree(path)


def _run(folder: Path) -> str:
    return str(read_json(folder / MANIFEST).get("run", ""))


def _folders(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders, whole or damaged, the newest step first; a name alone makes none of ours."""
    named = (path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if _run(path) or _has_parts(path)), key=_step, reverse=True)


def _has_parts(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, OPTIMIZER, STATE))


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


# --------------------------------------------------------------------------------------------------------- resuming


def verify(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or nothing if every file has the size and hash of its manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name in (WEIGHTS, CONFIG, OPTIMIZER, STATE, *files):
            path, facts = folder / name, files[name]
            if not path.is_file() or path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
                return f"{name} is missing or damaged"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    return ""


def newest(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint that verifies, or None if there never was one, and what was passed over and why.

    Raises CheckpointError where there are checkpoints and none verifies.
    """
    passed: dict[Path, str] = {}
    for folder in _folders(output_dir):
        if not (reason := verify(folder)):
            return folder, passed
        passed[folder] = reason
    if passed:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in passed.items())
        raise CheckpointError(
            f"--resume: no checkpoint in {output_dir} is whole ({reasons}); start anew with --overwrite"
        )
    return None, passed


def set_aside_after(output_dir: Path, chosen: Path | None) -> list[str]:
    """Set aside every checkpoint after the chosen one, to whose successors the run comes again, and say so.

    Without a chosen one, or with one from elsewhere, that is every one that is there.
    """
    said, step = [], -1
    if chosen is not None and chosen.resolve().parent == output_dir.resolve():
        step = _step(chosen)
    for folder in _folders(output_dir):
        if _step(folder) > step:
            said.append(
                f"{folder} is now {output_folder.rename_aside(folder, 'damaged' if verify(folder) else 'left').name}"
            )
    return said


def resolve(path: str) -> Path:
    """Return the folder named by --resume_from_checkpoint; ConfigError if it is missing or holds no checkpoint."""
    folder = user_path(path)
    if not folder.is_dir():
        raise ConfigError(f"--resume_from_checkpoint {path}: no such folder")
    if not (folder / MANIFEST).is_file():
        hint = (
            f"; to start from these weights with a fresh optimizer: --init_adapter {path}"
            if (folder / CONFIG).is_file()
            else ""
        )
        raise ConfigError(f"--resume_from_checkpoint {path}: holds no checkpoint{hint}")
    if reason := verify(folder):
        raise CheckpointError(f"--resume_from_checkpoint {path}: {reason}")
    return folder


def load(folder: Path) -> Checkpoint:
    """Return the contents of a checkpoint folder."""
    best = folder / BEST
    return Checkpoint(
        facts=json.loads((folder / STATE).read_text(encoding="utf-8")),
        weights=load_file(folder / WEIGHTS),
        optimizer=load_file(folder / OPTIMIZER),
        best=load_file(best) if best.is_file() else {},
    )


def weights_of(folder: Path) -> State:
    """Return the trained tensors of a checkpoint. Raises CheckpointError where it is not whole."""
    if reason := verify(folder):
        raise CheckpointError(f"{folder}: {reason}")
    return load_file(folder / WEIGHTS)
