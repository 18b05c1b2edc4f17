"""Prepared rows on the disk, used again when nothing that they depend on has changed."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_alpaca._version import __version__
from lora_alpaca.data import Rows
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Examples
from lora_alpaca.data.preparation import Prepared
from lora_alpaca.data.statistics import Statistics
from lora_alpaca.storage import atomic
from lora_alpaca.storage.paths import user_cache, user_path

CACHED_FROM = 5000  # rows; fewer are encoded in a second
KEPT = 10  # prepared data sets in the cache; the least recently used is removed first
STATISTICS = "ledger.json"


def cache_folder(cache_dir: str) -> Path | None:
    """Return the folder of prepared rows that `--cache_dir` names; None where rows are not cached."""
    if cache_dir == "none":
        return None
    if cache_dir:
        return user_path(cache_dir)
    return user_cache()


def cache_key(rows: Rows, encoder: Encoder, held_out: set[int], tokenizer_sha256: str) -> str:
    """Return a sha256 of everything that prepared rows depend on."""
    facts: dict[str, Any] = {
        "version": __version__,
        "data": [rows.data_path, rows.digest, rows.dropped],
        "held_out": sorted(held_out),
        "tokenizer": tokenizer_sha256,
        "template": [encoder.template.name, encoder.template.digest()],
        "choices": asdict(encoder.choices),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def cached(folder: Path | None, key: str) -> Prepared | None:
    """Return what an earlier run prepared, mapped from its files; None if nothing is cached, or a file is damaged."""
    if folder is None or not (folder / key / STATISTICS).is_file():
        return None
    try:
        statistics = Statistics.from_json(json.loads((folder / key / STATISTICS).read_text(encoding="utf-8")))
        train, validation = (Examples.mapped(folder / key, name) for name in ("train", "validation"))
        sizes = (len(train), len(validation)) == (statistics.train, statistics.validation)
        whole = sizes and train.is_whole() and validation.is_whole()
        os.utime(folder / key)
    except (OSError, ValueError, TypeError):
        return None
    return Prepared(train, validation, statistics) if whole else None


def keep(folder: Path | None, key: str, prepared: Prepared) -> Prepared:
    """Write prepared rows to the cache, all of them or nothing, and return them mapped from its files.

    Without a cache, or where the disk refuses, the rows themselves are returned.
    """
    if folder is None:
        return prepared
    stage = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        prepared.train.save(stage, "train")
        prepared.validation.save(stage, "validation")
        (stage / STATISTICS).write_text(json.dumps(prepared.statistics.to_json()), encoding="utf-8")
        if (folder / key).exists():  # written by another process, or damaged
            shutil.rmtree(folder / key)
        atomic.fsync_tree(stage)
        atomic.rename(stage, folder / key)
        _forget_oldest(folder)
    except OSError:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        return prepared
    return cached(folder, key) or prepared


def _forget_oldest(folder: Path) -> None:
    """Remove the prepared data sets, folders named by a hash with statistics in them, beyond the newest."""
    ours = [path for path in folder.iterdir() if len(path.name) == 64 and (path / STATISTICS).is_file()]
    for path in sorted(ours, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
