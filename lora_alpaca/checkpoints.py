"""Checkpoints: everything a run needs to go on as if it had never stopped, written whole or not at all.

checkpoint-200/
  adapter_model.safetensors, adapter_config.json   the adapter, as PEFT reads it
  optimizer.safetensors                            AdamW's moments, by parameter
  random.safetensors                               the random state of every rank
  best.safetensors                                 the adapter with the best validation loss so far, if there is one
  state.json                                       step, plan, history, best loss, options
  manifest.json                                    size and sha256 of each of these, written last
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lora_alpaca import folders
from lora_alpaca.adapters import SETTINGS, WEIGHTS, State
from lora_alpaca.errors import CheckpointError, ConfigError
from lora_alpaca.options import user_path

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Checkpoint:
    """The contents of a checkpoint: tensors by group, and the facts that fit into JSON."""

    facts: dict[str, Any]
    adapter: State
    optimizer: State
    random: State  # "rank0.cpu", "rank0.cuda", ...
    best: State = field(default_factory=dict)


def save(output_dir: Path, checkpoint: Checkpoint, settings: dict[str, Any]) -> Path:
    """Write a checkpoint for `facts["step"]` and return its folder. It appears by a rename, complete."""
    folder = output_dir / f"checkpoint-{checkpoint.facts['step']}"
    stage = folders.fresh_stage(folder)
    folders.write_tensors(stage / WEIGHTS, checkpoint.adapter)
    folders.write_tensors(stage / "optimizer.safetensors", checkpoint.optimizer)
    folders.write_tensors(stage / "random.safetensors", checkpoint.random)
    if checkpoint.best:
        folders.write_tensors(stage / "best.safetensors", checkpoint.best)
    folders.write_json(stage / SETTINGS, settings)
    folders.write_json(stage / "state.json", checkpoint.facts)
    files = {
        name: {"bytes": (stage / name).stat().st_size, "sha256": folders.sha256(stage / name)}
        for name in folders.files_below(stage)
    }
    folders.write_json(stage / folders.CHECKPOINT_FILES, {"step": checkpoint.facts["step"], "files": files})
    if folder.exists():  # a resumed run has come to the same step again, with the same result
        folders.remove_checkpoint(folder)
    os.replace(stage, folder)
    return folder


def rotate(output_dir: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`, by step number; only complete ones of ours are touched."""
    for folder in _folders(output_dir)[keep:]:
        folders.remove_checkpoint(folder)


def _folders(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders that have a manifest, the newest step first."""
    steps = {int(found[1]): path for path in output_dir.glob("checkpoint-*") if (found := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True) if (steps[step] / folders.CHECKPOINT_FILES).is_file()]


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or nothing if every file has the size and hash of its manifest."""
    try:
        files = json.loads((folder / folders.CHECKPOINT_FILES).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != facts["bytes"] or folders.sha256(path) != facts["sha256"]:
                return f"{name} is missing or damaged"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folders.CHECKPOINT_FILES} is missing or damaged"
    return ""


def newest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, or None if there never was one, and what was passed over and why.

    Raises CheckpointError where there are checkpoints and none verifies.
    """
    passed: list[str] = []
    for folder in _folders(output_dir):
        if not (reason := damage(folder)):
            return folder, passed
        passed.append(f"passed over {folder}: {reason}")
    if passed:
        raise CheckpointError(
            f"--resume: no checkpoint in {output_dir} is whole ({'; '.join(passed)}); start anew with --overwrite"
        )
    return None, passed


def named(path: str) -> Path:
    """Return the folder named by --resume_from_checkpoint; ConfigError if it is missing or holds no checkpoint."""
    folder = user_path(path)
    if not folder.is_dir():
        raise ConfigError(f"--resume_from_checkpoint {path}: no such folder")
    if not (folder / folders.CHECKPOINT_FILES).is_file():
        hint = (
            f"; to start from these weights with a fresh optimizer: --init_adapter {path}"
            if (folder / SETTINGS).is_file()
            else ""
        )
        raise ConfigError(f"--resume_from_checkpoint {path}: holds no checkpoint{hint}")
    if reason := damage(folder):
        raise CheckpointError(f"--resume_from_checkpoint {path}: {reason}")
    return folder


def load(folder: Path) -> Checkpoint:
    """Return the contents of a checkpoint folder."""
    best = folder / "best.safetensors"
    return Checkpoint(
        facts=json.loads((folder / "state.json").read_text(encoding="utf-8")),
        adapter=load_file(folder / WEIGHTS),
        optimizer=load_file(folder / "optimizer.safetensors"),
        random=load_file(folder / "random.safetensors"),
        best=load_file(best) if best.is_file() else {},
    )
