"""Checkpoints: everything that a run needs to resume as if it had never stopped, written whole or not at all.

checkpoint-200/
  adapter_model.safetensors, adapter_config.json   the adapter, as PEFT reads it
  optimizer.safetensors                            AdamW's moments, by parameter
  best.safetensors                                 the best adapter so far, where no checkpoint of its own holds it
  state.json                                       step, plan, history, best loss, options
  manifest.json                                    the run, and size and sha256 of each of these

A checkpoint has no random state: that of a step follows from seed, step and rank.
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
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import MANIFEST, remove_checkpoint
from lora_alpaca.storage.paths import files_below, read_json, sha256, user_path

OPTIMIZER, BEST, STATE = "optimizer.safetensors", "best.safetensors", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|final)\.(partial|removed)")  # of an interrupted save or removal


@dataclass
class Checkpoint:
    """The contents of a checkpoint: tensors by group, and the facts that fit into JSON."""

    facts: dict[str, Any]
    weights: State
    optimizer: State
    best: State = field(default_factory=dict)


def save(output_dir: Path, run: str, checkpoint: Checkpoint, settings: dict[str, Any]) -> Path:
    """Write a checkpoint for `facts["step"]` of a run and return its folder, which appears whole, by a rename.

    The caller holds the lock of `output_dir`. Raises TrainingError, before anything is written, if a tensor of the
    checkpoint is not finite, and OSError.
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
        if folder.exists():  # not made by this run, which set its own later ones aside when it resumed
            atomic.rename_aside(folder, "left")
        atomic.rename(stage, folder)
    return folder


def rotate(output_dir: Path, run: str, keep: int, spare: int | None = None) -> None:
    """Remove the checkpoints of a run but for the newest `keep`, by step number, and that of step `spare`.

    Checkpoints of other runs are not touched. What an earlier call could not remove is tried again. Raises OSError.
    """
    remove_leftovers(output_dir)
    ours = [folder for folder in _folders(output_dir) if _run(folder) == run]
    for folder in ours[keep:]:
        if _step(folder) != spare:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint, but for files of the user's own in it.

    The folder is renamed first, so that what an interrupted removal leaves does not look like a checkpoint.
    """
    listed = read_json(folder / MANIFEST).get("files", {})
    if set(files_below(folder)) <= {*listed, MANIFEST}:
        hidden = folder.with_name(f".{folder.name}.removed")
        atomic.remove_tree(hidden)
        atomic.rename(folder, hidden)
        folder = hidden
    remove_checkpoint(folder)


def remove_leftovers(output_dir: Path) -> None:
    """Remove the hidden folders that interrupted saves and removals left in a folder of ours."""
    for path in output_dir.glob(".*"):
        if path.is_dir() and _LEFTOVER.fullmatch(path.name):
            atomic.remove_tree(path)


def _run(folder: Path) -> str:
    return str(read_json(folder / MANIFEST).get("run", ""))


def _folders(output_dir: Path) -> list[Path]:
    """Return the folders of our checkpoints, whole or damaged, the newest step first; the name alone is no proof."""
    named = (path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if _run(path) or _has_parts(path)), key=_step, reverse=True)


def _has_parts(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, OPTIMIZER, STATE))


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


# --------------------------------------------------------------------------------------------------------- resuming


def verify(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or "" if every file has the size and hash that its manifest lists."""
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
    """Return the newest checkpoint that verifies, and folder -> reason of the newer ones that do not.

    The checkpoint is None where there is none at all. Raises CheckpointError where there are some and none verifies.
    """
    passed_over: dict[Path, str] = {}
    for folder in _folders(output_dir):
        if not (reason := verify(folder)):
            return folder, passed_over
        passed_over[folder] = reason
    if passed_over:
        reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in passed_over.items())
        raise CheckpointError(
            f"--resume: no checkpoint in {output_dir} is whole ({reasons}); start anew with --overwrite"
        )
    return None, passed_over


def set_aside_after(output_dir: Path, chosen: Path | None) -> list[str]:
    """Rename every checkpoint later than the chosen one, whose steps the run takes again, and return notes on that.

    Without a chosen checkpoint, or with one of another folder, all checkpoints are renamed.
    """
    notes, step = [], -1
    if chosen is not None and chosen.resolve().parent == output_dir.resolve():
        step = _step(chosen)
    for folder in _folders(output_dir):
        if _step(folder) > step:
            aside = atomic.rename_aside(folder, "damaged" if verify(folder) else "left")
            notes.append(f"{folder} is now {aside.name}")
    return notes


def resolve(path: str) -> Path:
    """Return the folder that --resume_from_checkpoint names.

    Raises ConfigError if the folder is missing or holds no checkpoint, CheckpointError if the checkpoint is damaged.
    """
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
    """Return the adapter of a checkpoint folder. Raises CheckpointError if the checkpoint is damaged."""
    if reason := verify(folder):
        raise CheckpointError(f"{folder}: {reason}")
    return load_file(folder / WEIGHTS)
