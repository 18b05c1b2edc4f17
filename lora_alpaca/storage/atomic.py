"""The one place that writes: every file, flush, rename and removal, in an order that a crash cannot spoil.

What others read, a run that resumes or a model that is loaded, appears by a rename. What is renamed has been flushed to
the disk before, and the folder that it appears in is flushed after. So there is always the old or the new, whole.
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lora_alpaca.lock"


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
    """Write a file whole: beside its place, then renamed into it."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        write(beside, data)
        rename(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def rename(path: Path, to: Path) -> None:
    """Rename a file or folder, over a file or an empty folder that is there, and make the new name last."""
    os.replace(path, to)
    sync_folder(to.parent)
    if path.parent != to.parent:
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder that may be there, and those above it, and make their names last."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    if not any(folder.iterdir()):
        os.rmdir(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush everything below a folder, whoever wrote it; make its files as readable as the user's umask says."""
    remove(folder / LOCK)  # of `staged`: what is settled is about to be renamed
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            os.chmod(path, 0o666 & ~umask)  # safetensors' own writer lets nobody else read
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_folder(folder)


@contextmanager
def rust_errors_as_oserror() -> Iterator[None]:
    """Turn what writers in Rust raise where a disk fails, within this context, into the OSError that it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Give an empty, hidden folder beside `folder`, to be filled, settled and renamed before the context ends.

    Otherwise it is removed. One that a crash left behind is emptied and used; one in use is BlockingIOError.
    """
    stage = folder.with_name(f".{folder.name}.partial")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(stage))
        except BlockingIOError:
            raise
        except OSError:
            remove_tree(stage)
            raise
        try:
            remove_tree(stage, but=LOCK)
            yield stage
        finally:
            remove_tree(stage)


def remove_tree(folder: Path, but: str = "") -> None:
    """Remove a hidden folder of ours and what is in it; with `but` only what is in it, except a file of that name."""
    if not but:
        return shutil.rmtree(folder, ignore_errors=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != but:
            remove(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if need be, until the context ends or this process does.

    Raises BlockingIOError, with the name of the process that is there.
    """
    make_folder(folder)
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()
        raise BlockingIOError(owner or "a process that has just begun") from None
    try:
        with suppress(OSError):  # a full disk: it is locked all the same
            write(folder / LOCK, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # a disk that fails: what is done here is done all the same
            remove(folder / LOCK)  # it names this machine, and folders are published
        lock.release()


# -------------------------------------------------------------------------------------------------------- contents


def as_json(value: Any) -> bytes:
    """Return a value as indented JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()
