"""Checkpoints: everything that a run needs to resume as if it had never stopped, written whole or not at all.

checkpoint-200/
  adapter_model.safetensors, adapter_config.json   the adapter, as PEFT reads it
  optimizer.safetensors                            AdamW's moments, by parameter
  best.safetensors                                 the best adapter so far, where no checkpoint of its own holds it
  state.json                                       step, plan, history, best loss, options
  manifest.json                                    the run, and size and sha256 of each of these

One of full finetuning has its tensors in parts, safetensors files that each rank wrote its own of:

checkpoint-200/
  weights/, optimizer/                             the weights that learn, and the optimizer's state, by parameter
  state.json, manifest.json                        as above

A checkpoint has no random state: that of a step follows from seed, step and rank.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_alpaca.errors import CheckpointError, ConfigError, TrainingError
from lora_alpaca.models.lora import CONFIG, WEIGHTS
from lora_alpaca.models.trainable import State
from lora_alpaca.models.weights import as_safetensors, is_finite, load_tensors
from lora_alpaca.storage import atomic
from lora_alpaca.storage.json_files import Count, Shape, read_json, require_object
from lora_alpaca.storage.output_folder import MANIFEST, read_manifest, remove_checkpoint, remove_former
from lora_alpaca.storage.paths import files_below, sha256, user_path

OPTIMIZER, BEST, STATE = "optimizer.safetensors", "best.safetensors", "state.json"
WEIGHT_PARTS, OPTIMIZER_PARTS = "weights", "optimizer"  # folders
HASHING_THREADS = 4
_REMEDY = "take another checkpoint, or start anew with --overwrite"
_NAME = re.compile(r"checkpoint-(\d+)")
_FORMER = re.compile(r"\.(checkpoint-\d+|final)\.(partial|removed)")  # what version 0.1 left when it was killed


class Facts(Shape):
    """What every `state.json` has, whatever version wrote it; those who resume from it look at more."""

    step: Count
    plan: dict[str, Any]
    progress: dict[str, Any]
    record: dict[str, Any]


@dataclass
class Checkpoint:
    """The contents of a checkpoint: the facts that fit into JSON, and tensors by group, none if they are in parts."""

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
    if name := not_finite(checkpoint.weights | checkpoint.optimizer):
        raise TrainingError(no_longer_finite(step, name))
    contents = {
        WEIGHTS: as_safetensors(checkpoint.weights),
        CONFIG: atomic.as_json(settings),
        OPTIMIZER: as_safetensors(checkpoint.optimizer),
    }
    if checkpoint.best:
        contents[BEST] = as_safetensors(checkpoint.best)
    with staged(output_dir, step) as stage:
        for name, data in contents.items():
            atomic.write(stage / name, data)
        return publish(
            stage, output_dir, run, checkpoint.facts, {name: _facts(data) for name, data in contents.items()}
        )


def not_finite(tensors: State) -> str:
    """Return the name of a tensor that has NaN or infinity in it, nothing where none has."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), "")


def no_longer_finite(step: int, name: str) -> str:
    """Return what is said of a tensor with NaN or infinity in it, of which no checkpoint is made."""
    return (
        f"step {step}: {name} is no longer finite, so no checkpoint is made of it; lower --learning_rate and "
        "go on from the one before with --resume --allow_change learning_rate"
    )


@contextmanager
def staged(output_dir: Path, step: int) -> Iterator[Path]:
    """Give the empty, hidden folder of a checkpoint, to be filled and published within this context."""
    with atomic.staging_folder(output_dir / f"checkpoint-{step}") as stage:
        yield stage


def publish(stage: Path, output_dir: Path, run: str, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> Path:
    """Complete a stage by state and manifest, flush it, rename it to the checkpoint, and return that folder.

    `files` are size and sha256 of what is in the stage, by relative paths.
    """
    state = atomic.as_json(facts)
    atomic.write(stage / STATE, state)
    manifest = {"run": run, "step": facts["step"], "files": files | {STATE: _facts(state)}}
    atomic.write(stage / MANIFEST, atomic.as_json(manifest))
    atomic.fsync_tree(stage)
    folder = output_dir / f"checkpoint-{facts['step']}"
    if os.path.lexists(folder):  # not made by this run, which set its own later ones aside when it resumed
        atomic.rename_aside(folder, "left")
    atomic.rename(stage, folder)
    return folder


def _facts(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def rotate(output_dir: Path, run: str, keep: int, spare: int | None = None) -> None:
    """Remove the checkpoints of a run but for the newest `keep`, by step number, and that of step `spare`.

    Checkpoints of other runs are not touched. What an earlier call could not remove is tried again. Raises OSError.
    """
    remove_leftovers(output_dir)
    ours = [folder for folder in _folders(output_dir) if _run(folder) == run and not folder.is_symlink()]
    for folder in ours[keep:]:
        if _step(folder) != spare:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint, but for files of the user's own in it; no link to one.

    The folder is renamed first, so that what an interrupted removal leaves does not look like a checkpoint.
    """
    listed = read_manifest(folder).get("files", {})
    if folder.is_symlink() or not set(files_below(folder)) <= {*listed, MANIFEST}:
        remove_checkpoint(folder)
        return
    with atomic.hidden_folder(folder, "removed") as hidden:
        atomic.rename(folder, hidden / folder.name)
        remove_checkpoint(hidden / folder.name)


def remove_leftovers(output_dir: Path) -> None:
    """Remove the hidden folders that interrupted saves and removals left in a folder of ours."""
    atomic.remove_hidden(output_dir)
    for path in output_dir.glob(".*"):
        if _FORMER.fullmatch(path.name):
            remove_former(output_dir, path.name)


def _run(folder: Path) -> str:
    return str(read_manifest(folder).get("run", ""))


def _folders(output_dir: Path) -> list[Path]:
    """Return the folders of our checkpoints, whole or damaged, the newest step first; the name alone is no proof."""
    named = (path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if _names_a_run(path) or _has_parts(path)), key=_step, reverse=True)


def _names_a_run(folder: Path) -> bool:
    return bool(read_json(folder / MANIFEST).get("run"))  # a damaged manifest may do so too


def _has_parts(folder: Path) -> bool:
    return is_in_parts(folder) or any((folder / name).is_file() for name in (WEIGHTS, OPTIMIZER, STATE))


def is_in_parts(folder: Path) -> bool:
    """Return whether a checkpoint is one of full finetuning, which has its tensors in parts."""
    return (folder / WEIGHT_PARTS).is_dir()


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


# --------------------------------------------------------------------------------------------------------- resuming


def verify(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or "" if every file has the size and hash that its manifest lists."""
    files = read_manifest(folder).get("files", {})
    in_parts = any(name.startswith(f"{WEIGHT_PARTS}/") for name in files)
    if not {STATE, *(() if in_parts else (WEIGHTS, CONFIG, OPTIMIZER))} <= files.keys():
        return f"{MANIFEST} is missing or damaged"
    pool = ThreadPoolExecutor(HASHING_THREADS)
    try:
        sound = pool.map(lambda name: _is_sound(folder / name, files[name]), files)
        return next(
            (f"{name} is missing or damaged" for name, is_sound in zip(files, sound, strict=True) if not is_sound), ""
        )
    finally:
        pool.shutdown(cancel_futures=True)  # of gigabytes that a signal leaves unread


def _is_sound(path: Path, facts: dict[str, Any]) -> bool:
    try:
        return path.is_file() and path.stat().st_size == facts["bytes"] and sha256(path) == facts["sha256"]
    except (OSError, ValueError):
        return False


def newest(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint that verifies, and folder -> reason of the newer ones that do not.

    The checkpoint is None where there is none at all. Raises CheckpointError where there are some and none verifies.
    """
    passed_over: dict[Path, str] = {}
    for folder in _folders(output_dir):
        reason = "is a symbolic link, which only --resume_from_checkpoint follows" if folder.is_symlink() else ""
        if not (reason := reason or verify(folder)):
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
    """Return the contents of a checkpoint folder. Raises CheckpointError for one that holds something else."""
    if is_in_parts(folder):
        return Checkpoint(read_state(folder), {}, {})
    best = folder / BEST
    return Checkpoint(
        facts=read_state(folder),
        weights=load_tensors(folder / WEIGHTS, CheckpointError),
        optimizer=load_tensors(folder / OPTIMIZER, CheckpointError),
        best=load_tensors(best, CheckpointError) if best.is_file() else {},
    )


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `state.json` holds. Raises CheckpointError, in one line, for a file without what is read of it."""
    state = require_object(folder / STATE, CheckpointError, _REMEDY)
    Facts.require(state, folder / STATE, CheckpointError, _REMEDY)
    return state


def weights_of(folder: Path) -> State:
    """Return the adapter of a checkpoint folder. Raises CheckpointError if the checkpoint is damaged."""
    if reason := verify(folder):
        raise CheckpointError(f"{folder}: {reason}")
    return load_tensors(folder / WEIGHTS, CheckpointError)
