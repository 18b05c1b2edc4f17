"""The only module that writes: every file, flush, rename, removal and lock, in an order that survives a crash.

Whatever is read later appears under its name by a rename. Its data is flushed to the disk before the rename, and the
folder it appears in is flushed after. So a crash leaves either the old contents or the new ones, whole.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK_TIMEOUT = 0.1  # seconds


def write(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Write a file under a hidden name and rename it to its own, so that no reader sees half of it."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        write(beside, data)
        rename(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def rename(path: Path, to: Path) -> None:
    """Rename a file or folder, replacing a file or an empty folder of that name, and flush the names."""
    os.replace(path, to)
    sync_folder(to.parent)
    if path.parent != to.parent:
        sync_folder(path.parent)


def rename_aside(path: Path, ending: str = "") -> Path:
    """Rename a folder to the first free of `name.1`, `name.2`, ..., or of `name.ENDING`, `name.ENDING.1`, ..."""
    path = path.resolve()
    name = f"{path.name}.{ending}" if ending else path.name
    number = 0 if ending else 1
    while (aside := path.with_name(f"{name}.{number}" if number else name)).exists():
        number += 1
    rename(path, aside)
    return aside


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are missing, and flush their names."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, if it exists."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    if not any(folder.iterdir()):
        os.rmdir(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush everything below a folder, whoever wrote it, and give its files the mode that the user's umask says."""
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            os.chmod(path, 0o666 & ~umask)  # safetensors' own writer makes files that only the user can read
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_folder(folder)


@contextmanager
def rust_errors_as_oserror() -> Iterator[None]:
    """Raise OSError, within this context, for an error of a disk that a writer in Rust raises as its own type."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Give an empty, hidden folder beside `folder`, to be filled, flushed and renamed within this context.

    It is removed at the end if it was not renamed, and emptied first if a crash left one. The caller holds a lock.
    """
    stage = folder.with_name(f".{folder.name}.partial")
    try:
        remove_tree(stage)
        make_folder(stage)
        yield stage
    finally:
        remove_tree(stage)


def remove_tree(folder: Path) -> None:
    """Remove a hidden folder of ours and everything in it, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` until the context ends, which removes the file, or until this process dies.

    A file that a killed process left is no obstacle. Raises BlockingIOError, with the name of the process that holds
    the lock.
    """
    make_folder(path.parent)
    lock = FileLock(path, thread_local=False)
    try:
        # The holder removes the file, then unlocks it. Who opened it just before holds a lock without a name in the
        # end: filelock sees that (the file has no link left) and tries again, for which it needs a little time.
        lock.acquire(timeout=LOCK_TIMEOUT, poll_interval=LOCK_TIMEOUT / 20)
    except Timeout:
        raise BlockingIOError(_holder(path) or "a process that has just begun") from None
    try:
        with suppress(OSError):  # on a full disk the lock holds all the same, without a name in it
            write(path, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # a disk that fails does not undo the work
            remove(path)
        lock.release()


def _holder(lock: Path) -> str:
    """Return what a lock file says about the process that holds it."""
    with suppress(OSError):
        return lock.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def as_json(value: Any) -> bytes:
    """Return a value as indented JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()
