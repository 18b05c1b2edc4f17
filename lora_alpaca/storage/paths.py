"""Paths that a user names, the user's cache, and reading small files."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def user_path(name: str) -> Path:
    """Return the path that a user named, `~` expanded; that of an unknown user is a name like any other."""
    return Path(os.path.expanduser(name))


def user_cache() -> Path:
    """Return the folder of ours in the user's cache; it need not be there yet."""
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lora_alpaca"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, or an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """Return all files of a folder as sorted relative paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
