"""Prepared rows on the disk, used again when nothing that they depend on has changed."""

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_alpaca._version import __version__
from lora_alpaca.data import Rows
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Examples
from lora_alpaca.data.preparation import Prepared
from lora_alpaca.data.statistics import Statistics
from lora_alpaca.storage import atomic, json_files
from lora_alpaca.storage.handles import RealFolder, make_private
from lora_alpaca.storage.paths import user_cache, user_path

CACHED_FROM = 5000  # rows; fewer are encoded in a second
KEPT = 10  # prepared data sets in the cache; the least recently used is removed first
STATISTICS = "ledger.json"
_KEY = re.compile(r"[0-9a-f]{64}")


def cache_folder(cache_dir: str) -> tuple[Path | None, list[str]]:
    """Return the folder of prepared rows that `--cache_dir` names, None where rows are not cached, and notes on that.

    A folder that other users own or can write to is not used: what is in it may be theirs.
    """
    if cache_dir == "none":
        return None, []
    folder = user_path(cache_dir) if cache_dir else user_cache()
    try:
        if wrong := make_private(folder):
            return None, [f"warning: the cache {folder} {wrong}; rows are not kept there, name another: --cache_dir"]
    except OSError:  # rows are prepared anew, which only takes time
        return None, []
    return folder, []


def cache_key(
    rows: Rows, encoder: Encoder, held_out: set[int], tokenizer_sha256: str, validation: Rows | None = None
) -> str:
    """Return a sha256 of everything that prepared rows depend on."""
    facts: dict[str, Any] = {
        "version": __version__,
        "data": [[part.data_path, part.digest, part.dropped] for part in (rows, validation) if part is not None],
        "held_out": sorted(held_out),
        "tokenizer": tokenizer_sha256,
        "template": [encoder.template.name, encoder.template.digest()],
        "choices": asdict(encoder.choices),
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def cached(folder: Path | None, key: str) -> Prepared | None:
    """Return what an earlier run prepared, mapped from its files; None if nothing is cached, or a file is damaged."""
    if folder is None or not (folder / key / STATISTICS).is_file() or (folder / key).is_symlink():
        return None
    try:
        statistics = Statistics.from_json(json_files.load(folder / key / STATISTICS))
        train, validation = (Examples.mapped(folder / key, name) for name in ("train", "validation"))
        sizes = (len(train), len(validation)) == (statistics.train, statistics.validation)
        whole = sizes and train.is_whole() and validation.is_whole()
        os.utime(folder / key)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return Prepared(train, validation, statistics) if whole else None


def keep(folder: Path | None, key: str, prepared: Prepared) -> Prepared:
    """Write prepared rows to the cache, all of them or nothing, and return them mapped from its files.

    Without a cache, or where the disk refuses, the rows themselves are returned.
    """
    if folder is None:
        return prepared
    try:
        atomic.remove_hidden(folder, locked=False)
        with atomic.staging_folder(folder / key) as stage:
            os.chmod(stage, 0o700)  # it holds the rows
            prepared.train.save(stage, "train")
            prepared.validation.save(stage, "validation")
            atomic.write(stage / STATISTICS, json.dumps(prepared.statistics.to_json()).encode())
            atomic.fsync_tree(stage)
            with RealFolder.opened(folder) as cache:
                cache.remove(key)  # written by another process, or damaged
            atomic.rename(stage, folder / key)
        _forget_oldest(folder)
    except OSError:
        return prepared
    return cached(folder, key) or prepared


def _forget_oldest(folder: Path) -> None:
    """Remove the prepared data sets, folders named by a hash with statistics in them, beyond the newest."""
    with RealFolder.opened(folder) as cache:
        named = (name for name in cache.names() if _KEY.fullmatch(name) and cache.has_folder(name))
        ours = [name for name in named if (folder / name / STATISTICS).is_file()]
        for name in sorted(ours, key=lambda name: (folder / name).stat().st_mtime)[:-KEPT]:
            with suppress(OSError):
                cache.remove(name)
