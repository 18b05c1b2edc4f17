"""Paths that a user names, the user's cache, and what is below a folder."""

import hashlib
import os
import stat
from pathlib import Path


def user_path(name: str) -> Path:
    """Return the path that a user named, `~` expanded; that of an unknown user is a name like any other."""
    return Path(os.path.expanduser(name))


def user_cache() -> Path:
    """Return the folder of ours in the user's cache; it need not be there yet.

    Of a user without a home it is a place where nothing can be kept, and not a folder named `~`.
    """
    folder = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (folder if folder.is_absolute() else Path(os.devnull)) / "lora_alpaca"


def sha256(path: Path) -> str:
    """Return the sha256 of a file. Raises OSError for what is no file."""
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(22, "is not a plain file", str(path))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_waiting(name: str, flags: int) -> int:
    """Open a file; a pipe is opened without waiting for who writes to it."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def files_below(folder: Path) -> list[str]:
    """Return all files of a folder as sorted relative paths."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
