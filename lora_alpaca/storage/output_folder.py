"""Output folders: the status of one, the lock that keeps others out of it, and what may be removed from it.

A folder of ours contains a record, `lora_alpaca.json`: what the folder holds, whether that is finished, and which files
are ours. No other file is ever removed or written over.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from lora_alpaca.errors import FolderError
from lora_alpaca.storage import atomic
from lora_alpaca.storage.paths import read_json

RECORD = "lora_alpaca.json"
MANIFEST = "manifest.json"  # in every checkpoint: its run, its step, and its files with sizes and hashes
INNER_LOCK = ".lora_alpaca.lock"  # where a lock cannot be beside the folder; earlier versions always put it there
LEFTOVERS = {INNER_LOCK, f".{RECORD}.partial"}  # of a process that was killed at its very beginning
FolderStatus = Literal["free", "finished", "unfinished", "foreign"]


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder of ours, or an empty one."""
    record = read_json(folder / RECORD)
    return record if "status" in record else {}


class OutputFolder:
    """The folder that a run or an export writes to, which need not exist yet."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def record(self) -> dict[str, Any]:
        """Return the record of the folder, or an empty one."""
        return read_record(self.path)

    @property
    def status(self) -> FolderStatus:
        """Return whether the folder is free to use, a finished or an unfinished one of ours, or somebody else's."""
        if not self.path.exists() or (self.path.is_dir() and {path.name for path in self.path.iterdir()} <= LEFTOVERS):
            return "free"
        if not self.record:
            return "foreign"
        return "finished" if self.record["status"] == "finished" else "unfinished"

    # -------------------------------------------------------------------------------------------------- checks

    def check(self, overwrite: bool, remedy: str) -> None:
        """Raise FolderError where nothing may be written; `remedy` is what to do about an unfinished run."""
        if self.status == "foreign":
            what = "is not a folder" if not self.path.is_dir() else "is not empty and was not made by lora_alpaca"
            raise FolderError(f"--output_dir {self.path} {what}; name another folder")
        if self.status == "unfinished" and not overwrite:
            raise FolderError(f"--output_dir {self.path} holds an unfinished run; {remedy}")
        existing = _existing(self.path)
        if not os.access(existing, os.W_OK | os.X_OK):
            raise FolderError(f"--output_dir {self.path}: {existing} is not writable; name another folder")

    def check_unlocked(self) -> None:
        """Raise FolderError if another process works in the folder."""
        if self._lock().exists():
            with self.locked():
                pass

    def check_space(self, needed: int) -> None:
        """Raise FolderError where the disk has less than `needed` bytes left."""
        free = shutil.disk_usage(_existing(self.path)).free
        if free < needed:
            raise FolderError(
                f"--output_dir {self.path}: the run writes about {needed / 1e6:.0f} MB and the disk has "
                f"{free / 1e6:.0f} MB left; free some, lower --save_total_limit, or name another folder"
            )

    @contextmanager
    def disk_errors_named(self) -> Iterator[None]:
        """Raise FolderError for every error of the disk within this context."""
        try:
            with atomic.rust_errors_as_oserror():
                yield
        except FolderError:
            raise
        except OSError as error:
            raise FolderError(
                f"--output_dir {self.path}: it could not be written ({error.strerror or error}); free space there, or "
                "name another folder"
            ) from None

    # ------------------------------------------------------------------------------- one process at a time

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder within this context. Raises FolderError if one is in it."""
        with ExitStack() as stack:
            with self.disk_errors_named():
                try:
                    stack.enter_context(atomic.locked(self._lock()))
                except BlockingIOError as error:
                    raise FolderError(
                        f"--output_dir {self.path}: another run is at work there ({error}); wait for it, or name "
                        "another folder"
                    ) from None
            yield

    def _lock(self) -> Path:
        """Return the path of the lock: beside the folder, so that the folder can be renamed, removed and replaced.

        Beside a mounted volume is another disk, which processes that share the volume may not share, or a folder that
        the user cannot write to. Such a folder cannot be renamed either, so the lock is inside.
        """
        path = self.path.resolve()
        if os.path.ismount(path) or not os.access(_existing(path.parent), os.W_OK | os.X_OK):
            return path / INNER_LOCK
        return path.with_name(f".{path.name}.lock")

    @contextmanager
    def take(self, overwrite: bool) -> Iterator[list[str]]:
        """Lock a checked folder and give notes on what was done to make room: an unfinished run stays in it, a
        finished one is set aside, and either is removed with `overwrite`. Raises FolderError.
        """
        with self.locked():
            with self.disk_errors_named():
                self._remove_leftovers()
                resumes = self.status == "unfinished" and not overwrite
                notes = [] if resumes else self._make_room(overwrite)
            yield notes

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Lock the folder and give an empty, hidden one beside it, to be filled, flushed and published.

        Raises FolderError if another process is in the folder, and for every error of the disk within this context.
        """
        with self.disk_errors_named(), self.locked(), atomic.staging_folder(self.path) as stage:
            yield stage

    def publish(self, stage: Path, overwrite: bool) -> list[str]:
        """Rename a flushed stage to the folder and return notes on what was done to make room. Nobody sees half."""
        self._remove_leftovers()
        notes = self._make_room(overwrite)
        if any(path.name != RECORD for path in self.path.iterdir()):  # the user's own files stay where they are
            self.write_record(read_record(stage) | {"status": "unfinished"})  # the record that counts comes last
            for path in sorted(stage.iterdir(), key=lambda path: path.name == RECORD):
                atomic.rename(path, self.path / path.name)
            os.rmdir(stage)
        else:
            atomic.remove(self.path / RECORD)
            os.rmdir(self.path)
            atomic.rename(stage, self.path)
        return notes

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace the record of the folder."""
        atomic.replace(self.path / RECORD, atomic.as_json(record))

    # ---------------------------------------------------------------------------------------------- making room

    def _make_room(self, overwrite: bool) -> list[str]:
        """Remove or set aside what the folder holds, make it if it is missing, and return notes on that."""
        notes = []
        if self.status != "free":
            if overwrite:
                self.remove_ours()
                notes.append(f"removed the earlier results in {self.path}")
            else:
                notes.append(f"{self.path} holds finished results; they are now in {atomic.rename_aside(self.path)}")
        atomic.make_folder(self.path)
        return notes

    def _remove_leftovers(self) -> None:
        """Remove the files that a killed process left in the folder, but not the lock that is held now."""
        for name in LEFTOVERS - {self._lock().name}:
            atomic.remove(self.path / name)

    def remove_ours(self) -> None:
        """Remove the files that our records list, and the folders that this leaves empty.

        The record stays, as that of something unfinished, until another one replaces it: the folder is still ours.
        """
        record = self.record
        self.write_record(record | {"status": "unfinished"})
        for manifest in self.path.glob(f"checkpoint-*/{MANIFEST}"):
            remove_checkpoint(manifest.parent)
        for name in record.get("files", []):
            _remove_below(self.path, name)
        for path in sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True):
            atomic.remove_if_empty(path)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: the files that its manifest lists, and the folder if it is empty then."""
    manifest = read_json(folder / MANIFEST)
    if not {"step", "files"} <= manifest.keys():
        return  # a manifest, but not one of ours
    for name in [*manifest["files"], MANIFEST]:  # the manifest last: it is what makes the other files ours
        _remove_below(folder, name)
    atomic.remove_if_empty(folder)


def _remove_below(folder: Path, name: str) -> None:
    """Remove a file that a record lists, if it is below the folder of that record."""
    path = folder / name
    if path.resolve().is_relative_to(folder.resolve()) and not path.is_dir():
        atomic.remove(path)


def _existing(path: Path) -> Path:
    """Return a path, or the nearest one above it that exists."""
    return next(parent for parent in (path, *path.resolve().parents) if parent.exists())
