"""Folders held open, so that what is done in one happens there, whatever takes its place on the path meanwhile.

No name in such a folder is followed through a symbolic link, and no other disk that is mounted below it is entered.
What systems differ in is here too, in small functions.
"""

import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

WINDOWS = os.name == "nt"
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
PATIENCE = (0.01, 0.05, 0.2, 0.5)  # seconds before a rename that Windows has refused is tried again


class RealFolder:
    """A folder that is held open. On Windows, which cannot do that, its path is checked again at every call."""

    def __init__(self, path: Path, descriptor: int | None):
        self.path, self.descriptor = path, descriptor

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator["RealFolder"]:
        """Hold a folder that the user names within this context; links on the way to it are the user's own."""
        if WINDOWS:
            yield cls(path, None)
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield cls(path, descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def inside(self, name: str, make: bool = False) -> Iterator["RealFolder"]:
        """Hold a folder in this one within this context, made if it is missing and `make` says so.

        Raises NotADirectoryError for a link, a file, and the root of another disk.
        """
        if make:
            with suppress(FileExistsError):
                os.mkdir(self._at(name), **self._where())
        if not self.has_folder(name):
            raise NotADirectoryError(20, "is not a folder, or is another disk or a link", str(self.path / name))
        if WINDOWS:
            yield RealFolder(self.path / name, None)
            return
        descriptor = os.open(self._at(name), os.O_RDONLY | os.O_DIRECTORY | NO_LINK, **self._where())
        try:
            yield RealFolder(self.path / name, descriptor)
        finally:
            os.close(descriptor)

    def names(self) -> list[str]:
        """Return the names in the folder, sorted."""
        return sorted(os.listdir(self.path if self.descriptor is None else self.descriptor))

    def look(self, name: str) -> os.stat_result | None:
        """Return what is known of a name itself, not of what it leads to; None where there is none."""
        try:
            return os.stat(self._at(name), follow_symlinks=False, **self._where())
        except FileNotFoundError:
            return None

    def has_folder(self, name: str) -> bool:
        """Return whether a name is that of a real folder on the disk of this one."""
        found, here = self.look(name), os.stat(self.path if self.descriptor is None else self.descriptor)
        return found is not None and stat.S_ISDIR(found.st_mode) and not is_link(found) and found.st_dev == here.st_dev

    def read(self, name: str, most: int) -> bytes:
        """Return the beginning of a file in this folder; nothing where there is none, or something else."""
        found = self.look(name)
        if found is None or not stat.S_ISREG(found.st_mode):
            return b""
        descriptor = os.open(self._at(name), os.O_RDONLY | NO_LINK | getattr(os, "O_NONBLOCK", 0), **self._where())
        try:
            return os.read(descriptor, most)
        finally:
            os.close(descriptor)

    def take(self, path: Path) -> None:
        """Rename a file or folder into this folder, under its own name; a file or a link of that name goes."""
        rename(path, self.path / path.name, self.descriptor)

    def remove(self, name: str) -> None:
        """Remove what has this name: a file, a link but not what it leads to, or a folder with all that is in it."""
        if (found := self.look(name)) is None:
            return
        if not stat.S_ISDIR(found.st_mode) or is_link(found):
            os.unlink(self._at(name), **self._where())
            return
        with self.inside(name) as folder:
            for inner in folder.names():
                folder.remove(inner)
        os.rmdir(self._at(name), **self._where())

    def remove_listed(self, names: Iterable[str]) -> None:
        """Remove files by their paths in this folder, and the folders below it that this leaves empty.

        What is not there, or only through a link or on another disk, stays, as does a folder that has a file's name.
        """
        for name in names:
            parts = PurePosixPath(name).parts
            if parts and ".." not in parts and not PurePosixPath(name).is_absolute():
                self._remove_listed(parts)

    def _remove_listed(self, parts: tuple[str, ...]) -> None:
        name, *below = parts
        if not below:
            found = self.look(name)
            if found is not None and not stat.S_ISDIR(found.st_mode):
                os.unlink(self._at(name), **self._where())
        elif self.has_folder(name):
            with self.inside(name) as folder:
                folder._remove_listed(tuple(below))
                is_empty = not folder.names()
            if is_empty:
                os.rmdir(self._at(name), **self._where())

    def _at(self, name: str) -> str | Path:
        return self.path / name if self.descriptor is None else name

    def _where(self) -> dict[str, Any]:
        return {} if self.descriptor is None else {"dir_fd": self.descriptor}


# ------------------------------------------------------------------------------------------ what systems differ in


def rename(path: Path, to: Path, folder: int | None = None) -> None:
    """Rename a file or folder, replacing a file, a link or an empty folder of that name.

    With the handle of a folder, the new name is in that folder. Windows renames over no folder, and over no file that
    another program, such as a virus scanner, has open for a moment.
    """
    if not WINDOWS:
        os.replace(path, to if folder is None else to.name, dst_dir_fd=folder)
        return
    for pause in (*PATIENCE, None):
        with suppress(OSError):
            os.rmdir(to)  # which an empty folder alone lets happen
        try:
            os.replace(path, to)
            return
        except PermissionError:
            if pause is None:
                raise
            time.sleep(pause)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can do that."""
    if WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_link(found: os.stat_result) -> bool:
    """Return whether a name that was looked at is a symbolic link, or what else leads elsewhere on Windows."""
    reparse = getattr(found, "st_file_attributes", 0) & getattr(stat, "FILE_ATTRIBUTE_REPARSE_POINT", 0)
    return stat.S_ISLNK(found.st_mode) or bool(reparse)


def is_own(found: os.stat_result) -> bool:
    """Return whether this user owns what was looked at; Windows is not asked."""
    return not hasattr(os, "geteuid") or found.st_uid == os.geteuid()


def others_can_write(found: os.stat_result) -> bool:
    """Return whether users besides the owner can change what was looked at; Windows is not asked."""
    return not WINDOWS and bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def make_private(folder: Path) -> str:
    """Make a folder that this user alone can look into, where it is missing.

    Return why one that is there already is not to be used, as a predicate, or nothing. Raises OSError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    if not is_own(os.lstat(folder)):  # a link, too, is only followed if it is this user's
        return "belongs to another user"
    found, above = os.stat(folder), os.stat(folder.parent)
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder"
    if not is_own(found):
        return "belongs to another user"
    if others_can_write(found):
        return "can be written to by other users"
    if not WINDOWS and above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        return "lies in a folder in which anybody can exchange it"
    return ""


def process_is_gone(number: int) -> bool:
    """Return whether no process of this machine has this number; False where that cannot be known."""
    if WINDOWS:  # where asking would end the process
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def reserved_part(path: Path) -> str:
    """Return the first part of a path that Windows does not take as a name, or nothing; elsewhere all are taken."""
    if not WINDOWS:
        return ""
    named = PureWindowsPath(str(path))
    parts = [part for part in named.parts if part not in (named.anchor, "..", ".")]
    wrong = (
        part
        for part in parts
        if set(part) & set('<>:"|?*') or part != part.rstrip(" .") or PureWindowsPath(part).is_reserved()
    )
    return next(wrong, "")
