"""Which base model this is: a sha256 of its config and of its weights, the same wherever the files lie.

Every file is read once. Its hash is kept in the user's cache under its path, size, time of change and inode, and is
free from then on. Files that huggingface_hub has downloaded are named by their hash already, and are not read at all.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_alpaca.errors import ModelError
from lora_alpaca.models.base import Base, config_file, weight_files
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.handles import make_private
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.paths import sha256, user_cache

CACHE = "file_hashes.json"
THREADS = min(8, 2 * (os.cpu_count() or 1))
FRESH_SECONDS = 2  # a file changed so lately may change again without a new time, so its hash is not kept
WRITER = ("_name_or_path", "transformers_version")  # keys of a config that do not describe the model


def hash_base(base: Base) -> str:
    """Return the sha256 of a base's config and weight files as 64 hex digits. Raises ModelError for missing ones.

    Equal for a folder, its copy under another name, and the same files on the hub; another one for the same weights
    in other files (split differently, or stored in another dtype).
    """
    config = read_json(config_file(base))
    facts = {
        "config": {key: value for key, value in config.items() if key not in WRITER},
        "weights": weight_hashes(base),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def weight_hashes(base: Base) -> dict[str, str]:
    """Return file name -> sha256 of a base's weights.

    Raises ModelError for files that are missing or, in a merged model of ours, not as they were exported.
    """
    files = weight_files(base)
    found = dict(zip((path.name for path in files), file_hashes(files), strict=True))
    exported = output_folder.read_record(files[0].parent).get("weights", found)
    for name in (name for name in found if found[name] != exported.get(name)):
        raise ModelError(
            f"--base_model {base.name}: {name} is not as it was exported (its sha256 is another); export it again"
        )
    return found


def file_hashes(paths: Sequence[Path]) -> list[str]:
    """Return the sha256 of files, side by side: from their names in the hub's cache, from ours, or by reading them."""
    kept = read_json(user_cache() / CACHE) if _is_private() else {}
    with ThreadPoolExecutor(THREADS) as pool:  # some read while others hash; neither needs Python's lock
        found = list(pool.map(lambda path: _hash(path, kept), paths))
    learned = {path: facts for path, facts in found if kept.get(path, facts) != facts or path not in kept}
    if old := {path: facts for path, facts in learned.items() if not _is_fresh(facts)}:
        _keep(old)
    return [facts[-1] for _, facts in found]


def _hash(path: Path, kept: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return the real path of a file, and its size, time of change, inode and hash."""
    real = path.resolve()
    now = real.stat()
    facts = [now.st_size, now.st_mtime_ns, now.st_ino]  # another file of the same time and size is another file
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return str(real), [*facts, real.name]
    before = kept.get(str(real))
    if isinstance(before, list) and before[:-1] == facts:
        return str(real), before
    return str(real), [*facts, sha256(real)]


def _is_fresh(facts: list[Any]) -> bool:
    return time.time_ns() - facts[1] < FRESH_SECONDS * 10**9


def _keep(learned: dict[str, Any]) -> None:
    """Add hashes to the cache. Where it cannot be written, or two processes write, only time is lost."""
    if not _is_private():
        return
    path = user_cache() / CACHE
    with suppress(OSError):
        atomic.remove_hidden(path.parent, of=CACHE, locked=False)
        atomic.replace(path, json.dumps(read_json(path) | learned).encode())


def _is_private() -> bool:
    """Return whether the user's cache is this user's alone: others could say there what the hash of a file is."""
    try:
        return not make_private(user_cache())
    except OSError:
        return False
