"""Files and folders that appear whole: written under a hidden name, flushed, renamed; and locks.

Whatever is read later appears under its name by a rename. Its data is flushed to the disk before the rename, and the
folder it appears in is flushed after. So a crash leaves either the old contents or the new ones, whole.

What is unfinished lies in a hidden folder with a name of its own, `.NAME.partial-0123456789ab`, that only this user can
open. A file in it says which process made it: such a folder is ours to remove when that process is gone, and no other.
"""

import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_alpaca.storage import handles
from lora_alpaca.storage.handles import NO_LINK, RealFolder, sync_folder

LOCK_TIMEOUT = 0.1  # seconds
MARK = "made_by_lora_alpaca"  # the file in a hidden folder that says whose it is
HIDDEN = re.compile(r"\.(?P<name>.+)\.(partial|removed)-[0-9a-f]{12}")
STALE = 24 * 3600  # seconds after which what a process of another machine left is taken to be left for good
_PROCESS = re.compile(rb"process (\d+) on (\S+)\n?")


# ------------------------------------------------------------------------------------------------------------- writing


def write(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk. Raises FileExistsError where anything has that name, a link too."""
    _write(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666), data)


def _write(descriptor: int, data: bytes) -> None:
    """Write to an open file, flush and close it."""
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes) -> None:
    """Write a file in a hidden folder and rename it to its own name, so that no reader sees half of it."""
    with hidden_folder(path) as hidden:
        write(hidden / path.name, data)
        rename(hidden / path.name, path)


def rename(path: Path, to: Path) -> None:
    """Rename a file or folder, replacing a file, a link or an empty folder of that name, and flush the names."""
    handles.rename(path, to)
    sync_folder(to.parent)
    if path.parent != to.parent:
        sync_folder(path.parent)


def move_into(folder: Path, stage: Path, names: Iterable[str]) -> None:
    """Rename files of a stage, by their paths in it, into a folder, and flush the names.

    Raises NotADirectoryError where a folder on the way is a link.
    """
    with RealFolder.opened(folder) as target:
        for name in names:
            _move(target, stage, tuple(Path(name).parts))


def _move(target: RealFolder, stage: Path, parts: tuple[str, ...]) -> None:
    name, *below = parts
    if below:
        with target.inside(name, make=True) as folder:
            _move(folder, stage / name, tuple(below))
    else:
        target.take(stage / name)
        sync_folder(target.path)
        sync_folder(stage)


def rename_aside(path: Path, ending: str = "") -> Path:
    """Rename a folder to the first free of `name.1`, `name.2`, ..., or of `name.ENDING`, `name.ENDING.1`, ..."""
    name = f"{path.name}.{ending}" if ending else path.name
    number = 0 if ending else 1
    while os.path.lexists(aside := path.with_name(f"{name}.{number}" if number else name)):
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
    """Remove a file, or a link itself, if it exists."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def fsync_tree(folder: Path) -> None:
    """Flush everything below a folder, whoever wrote it, and give its files the mode that the user's umask says."""
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            descriptor = os.open(path, os.O_RDWR | NO_LINK)
            try:
                if not handles.WINDOWS:  # safetensors' own writer makes files that only the user can read
                    os.fchmod(descriptor, 0o666 & ~umask)
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


def as_json(value: Any) -> bytes:
    """Return a value as indented JSON."""
    return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()


# ------------------------------------------------------------------------------------------------------ hidden folders


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder of the same name, in a hidden one, to be filled, flushed and renamed within this context.

    It is removed at the end if it was not renamed.
    """
    with hidden_folder(folder) as hidden:
        (hidden / folder.name).mkdir()
        yield hidden / folder.name


@contextmanager
def hidden_folder(path: Path, kind: str = "partial") -> Iterator[Path]:
    """Make a hidden folder of ours beside a path, for this context. Raises OSError where it was exchanged meanwhile."""
    hidden = path.with_name(f".{path.name}.{kind}-{secrets.token_hex(6)}")
    make_folder(path.parent)
    os.mkdir(hidden, 0o700)
    made = os.lstat(hidden)
    try:
        write(hidden / MARK, _this_process())
        sync_folder(hidden)
        yield hidden
        if not os.path.samestat(made, os.lstat(hidden)):
            raise OSError(1, f"{hidden} was exchanged for something else")
    finally:
        with suppress(OSError), RealFolder.opened(hidden.parent) as above:  # what cannot be removed stays
            if os.path.samestat(made, os.lstat(hidden)):
                above.remove(hidden.name)


def is_hidden(above: RealFolder, name: str) -> bool:
    """Return whether a name is that of a hidden folder of ours; one without a mark must be empty otherwise."""
    if not HIDDEN.fullmatch(name) or not above.has_folder(name):
        return False
    found = above.look(name)
    if found is None or not handles.is_own(found):
        return False
    with above.inside(name) as folder:
        mark = folder.look(MARK)
        signed = mark is not None and handles.is_own(mark) and _PROCESS.fullmatch(folder.read(MARK, 300)) is not None
        return signed or set(folder.names()) <= {MARK}


def remove_hidden(folder: Path, of: str | None = None, locked: bool = True) -> None:
    """Remove the hidden folders that killed processes left in a folder: all, or those `of` one name.

    `locked`: the caller holds the lock, so that no other process is at work on them. Without one, those of processes
    that may be alive stay.
    """
    with suppress(FileNotFoundError), RealFolder.opened(folder) as above:
        for name in above.names():
            match = HIDDEN.fullmatch(name)
            if match and of in (None, match["name"]) and is_hidden(above, name) and (locked or _is_left(above, name)):
                with suppress(OSError):  # what cannot be removed stays
                    above.remove(name)


def _is_left(above: RealFolder, name: str) -> bool:
    """Return whether the process that made a hidden folder is gone, as far as can be known."""
    with above.inside(name) as folder:
        made_by = _PROCESS.fullmatch(folder.read(MARK, 300))
        made_here = made_by is not None and made_by[2] == socket.gethostname().encode()
        if made_by and made_here and int(made_by[1]) != os.getpid() and handles.process_is_gone(int(made_by[1])):
            return True
    found = above.look(name)
    return found is not None and time.time() - found.st_mtime > STALE


def _this_process() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}\n".encode()


# --------------------------------------------------------------------------------------------------------------- locks


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path` until the context ends, which removes the file, or until this process dies.

    A file that a killed process left is no obstacle. Raises BlockingIOError, with the name of the process that holds
    the lock, and FileExistsError where something else than a lock of ours has that name.
    """
    make_folder(path.parent)
    _require_lock(path)
    lock = FileLock(path, thread_local=False)  # which opens no link
    try:
        # The holder removes the file, then unlocks it. Who opened it just before holds a lock without a name in the
        # end: filelock sees that (the file has no link left) and tries again, for which it needs a little time.
        lock.acquire(timeout=LOCK_TIMEOUT, poll_interval=LOCK_TIMEOUT / 20)
    except Timeout:
        raise BlockingIOError(_holder(path) or "a process that has just begun") from None
    try:
        with suppress(OSError):  # on a full disk the lock holds all the same, without a name in it
            _require_lock(path)
            _write(os.open(path, os.O_WRONLY | os.O_TRUNC | NO_LINK), _this_process())
        yield
    finally:
        if handles.WINDOWS:  # which removes no open file
            lock.release()
        with suppress(OSError):  # a disk that fails does not undo the work
            remove(path)
        lock.release()


def _require_lock(path: Path) -> None:
    """Raise FileExistsError where a name is that of something else than a lock of ours."""
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        begins = _holder(path)[:8]  # all of it, or what a power cut has left
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or not "process ".startswith(begins.rstrip("\0")):
            raise FileExistsError(17, f"{path} is no lock of lora_alpaca; remove it")


def _holder(lock: Path) -> str:
    """Return what a lock file says about the process that holds it."""
    with suppress(OSError), RealFolder.opened(lock.parent) as folder:
        return folder.read(lock.name, 300).decode(errors="replace").strip()
    return ""
