"""Output folders: the status of one, the lock that keeps others out of it, and what may be removed from it.

A folder of ours contains a record, `lora_alpaca.json`: what the folder holds, whether that is finished, and which files
are ours. No other file is ever removed or written over. A link that the user names as output folder is followed once,
at the beginning; no link in the folder or beside it is.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from lora_alpaca.errors import FolderError
from lora_alpaca.storage import atomic, handles
from lora_alpaca.storage.handles import RealFolder
from lora_alpaca.storage.json_files import ABSENT, Count, Shape, read_json

RECORD = "lora_alpaca.json"
PRIVATE = "lora_alpaca.private.json"  # what of the record is not to be published
MANIFEST = "manifest.json"  # in every checkpoint: its run, its step, and its files with sizes and hashes
INNER_LOCK = ".lora_alpaca.lock"  # where a lock cannot be beside the folder; earlier versions always put it there
LEFTOVERS = {INNER_LOCK, f".{RECORD}.partial"}  # files of a process of version 0.1 that was killed at its beginning
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_FORMER_FILES = re.compile(r".*\.(safetensors|json|model|jinja|txt)|\.lora_alpaca\.lock")  # in its hidden folders
FolderStatus = Literal["free", "finished", "unfinished", "foreign"]


class Record(Shape):
    """What every record has, be it of an adapter or of a merged model."""

    status: str
    files: list[str] = ABSENT
    weights: dict[str, str] = ABSENT


class FileFacts(Shape):
    """What a manifest says of a file."""

    bytes: Count
    sha256: str


class Manifest(Shape):
    """The content of `manifest.json` in a checkpoint."""

    step: Count
    run: str = ""
    files: dict[str, FileFacts]


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder of ours, or an empty one. Raises FolderError for one with keys of other types."""
    record = read_json(folder / RECORD)
    if "status" not in record:
        return {}
    Record.require(record, folder / RECORD, FolderError, "copy the folder again, or remove that file")
    return record


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, or an empty one where there is none of ours."""
    manifest = read_json(folder / MANIFEST)
    return {} if Manifest.what_is_wrong(manifest) else manifest


class OutputFolder:
    """The folder that a run or an export writes to, which need not exist yet."""

    def __init__(self, path: Path):
        self.path, self.real = path, Path(os.path.realpath(path))  # as the user named it, and where that is

    @property
    def record(self) -> dict[str, Any]:
        """Return the record of the folder, or an empty one."""
        return read_record(self.real)

    @property
    def status(self) -> FolderStatus:
        """Return whether the folder is free to use, a finished or an unfinished one of ours, or somebody else's."""
        if not os.path.lexists(self.real):
            return "free"
        if self.real.is_dir():
            with RealFolder.opened(self.real) as folder:
                if all(_is_leftover(folder, name) for name in folder.names()):
                    return "free"
        if not self.record:
            return "foreign"
        return "finished" if self.record["status"] == "finished" else "unfinished"

    # -------------------------------------------------------------------------------------------------- checks

    def check(self, overwrite: bool, remedy: str) -> None:
        """Raise FolderError where nothing may be written; `remedy` is what to do about an unfinished run."""
        nowhere = self.path.is_symlink() and not os.path.exists(self.path)
        if nowhere or any(map(os.path.islink, (self.real, *self.real.parents))):  # those that are left lead in a circle
            raise FolderError(f"--output_dir {self.path} is a symbolic link that leads nowhere; name another folder")
        if part := handles.reserved_part(self.path):
            raise FolderError(f"--output_dir {self.path}: {part} is no name for a folder on Windows; name another one")
        with self.disk_errors_named():
            status = self.status
        if status == "foreign":
            what = "is not a folder" if not self.path.is_dir() else "is not empty and was not made by lora_alpaca"
            raise FolderError(f"--output_dir {self.path} {what}; name another folder")
        if status == "unfinished" and not overwrite:
            raise FolderError(f"--output_dir {self.path} holds an unfinished run; {remedy}")
        existing = _existing(self.real)
        if not os.access(existing, os.W_OK | os.X_OK):
            raise FolderError(f"--output_dir {self.path}: {existing} is not writable; name another folder")

    def check_unlocked(self) -> None:
        """Raise FolderError if another process works in the folder."""
        if os.path.lexists(self._lock()):
            with self.locked():
                pass

    def check_space(self, needed: int) -> None:
        """Raise FolderError where the disk has less than `needed` bytes left."""
        free = shutil.disk_usage(_existing(self.real)).free
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
        path = self.real
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
                atomic.make_folder(self.real)
            yield notes

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Lock the folder and give an empty, hidden one beside it, to be filled, flushed and published.

        Raises FolderError if another process is in the folder, and for every error of the disk within this context.
        """
        with self.disk_errors_named(), self.locked():
            atomic.remove_hidden(self.real.parent, of=self.real.name)
            remove_former(self.real.parent, f".{self.real.name}.partial")
            with atomic.staging_folder(self.real) as stage:
                yield stage

    def publish(self, stage: Path, overwrite: bool) -> list[str]:
        """Rename a flushed stage to the folder and return notes on what was done to make room. Nobody sees half."""
        self._remove_leftovers()
        notes = self._make_room(overwrite)
        left = {path.name for path in self.real.iterdir()} if self.real.exists() else set()
        if left - {RECORD}:  # the user's own files stay where they are
            self.write_record(read_record(stage) | {"status": "unfinished"})  # the record that counts comes last
            names = sorted((path.name for path in stage.iterdir()), key=lambda name: name == RECORD)
            atomic.move_into(self.real, stage, names)
            os.rmdir(stage)
        else:
            if self.real.exists():
                atomic.remove(self.real / RECORD)
                os.rmdir(self.real)
            atomic.rename(stage, self.real)
        return notes

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace the record of the folder."""
        atomic.replace(self.real / RECORD, atomic.as_json(record))

    # ---------------------------------------------------------------------------------------------- making room

    def _make_room(self, overwrite: bool) -> list[str]:
        """Remove or set aside what the folder holds, and return notes on that."""
        notes = []
        if self.status != "free":
            if overwrite:
                self.remove_ours()
                notes.append(f"removed the earlier results in {self.path}")
            else:
                notes.append(f"{self.path} holds finished results; they are now in {atomic.rename_aside(self.real)}")
        return notes

    def _remove_leftovers(self) -> None:
        """Remove what a killed process left in the folder, but not the lock that is held now."""
        if not self.real.exists():
            return
        atomic.remove_hidden(self.real, of=RECORD)
        with RealFolder.opened(self.real) as folder:
            for name in LEFTOVERS - {self._lock().name}:
                if _is_leftover(folder, name):
                    folder.remove(name)

    def remove_ours(self) -> None:
        """Remove the files that our records list, and the folders that this leaves empty.

        The record stays, as that of something unfinished, until another one replaces it: the folder is still ours.
        """
        record = self.record
        self.write_record(record | {"status": "unfinished"})
        with RealFolder.opened(self.real) as folder:
            for name in filter(_CHECKPOINT.fullmatch, folder.names()):
                if folder.has_folder(name):  # and not a link to one
                    remove_checkpoint(self.real / name)
            folder.remove_listed(name for name in record.get("files", []) if name != RECORD)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: the files that its manifest lists, and the folder if it is empty then; no link to one."""
    with RealFolder.opened(folder.parent) as above:
        if not above.has_folder(folder.name):
            return
        if not (manifest := read_manifest(folder)):
            return
        # the manifest last: it is what makes the other files ours
        above.remove_listed(f"{folder.name}/{name}" for name in [*manifest["files"], MANIFEST])


def remove_former(above: Path, name: str) -> None:
    """Remove a hidden folder as version 0.1 named and left them; one with other files in it than it wrote stays."""
    with RealFolder.opened(above) as folder:
        found = folder.look(name)
        if found is not None and folder.has_folder(name) and handles.is_own(found):
            files = [path for path in (above / name).rglob("*") if path.is_symlink() or not path.is_dir()]
            if all(_FORMER_FILES.fullmatch(path.name) and not path.is_symlink() for path in files):
                folder.remove(name)


def _is_leftover(folder: RealFolder, name: str) -> bool:
    """Return whether a name in an output folder is that of what a process left that was killed at its beginning."""
    match = atomic.HIDDEN.fullmatch(name)
    if match and match["name"] == RECORD:
        return atomic.is_hidden(folder, name)
    found = folder.look(name)
    return name in LEFTOVERS and found is not None and stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _existing(path: Path) -> Path:
    """Return a real path, or the nearest one above it that exists."""
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))
