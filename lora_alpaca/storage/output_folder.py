"""Output folders: whose they are, who is at work in them, and what may be done to them.

A folder of ours carries a record, `lora_alpaca.json`: what it holds, whether it is finished, and which files are ours.
Nothing else is ever removed or written over.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from lora_alpaca.errors import FolderError
from lora_alpaca.storage import atomic
from lora_alpaca.storage.atomic import LOCK
from lora_alpaca.storage.paths import read_json

RECORD = "lora_alpaca.json"
MANIFEST = "manifest.json"  # in every checkpoint: its run, its step, and its files with sizes and hashes
Entered = TypeVar("Entered")
FolderStatus = Literal["free", "finished", "unfinished", "foreign"]


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder of ours, or an empty one."""
    record = read_json(folder / RECORD)
    return record if "status" in record else {}


def folder_status(folder: Path) -> FolderStatus:
    """Return whether a folder is free to use, a finished or an unfinished one of ours, or somebody else's."""
    if not folder.exists() or (folder.is_dir() and not _contents(folder)):
        return "free"
    record = read_record(folder) if folder.is_dir() else {}
    return "foreign" if not record else "finished" if record["status"] == "finished" else "unfinished"


def _contents(folder: Path) -> list[Path]:
    """Return what is in a folder, but for what a run that was killed at its very beginning leaves."""
    beginning = {LOCK, f".{RECORD}.partial"}
    return [path for path in folder.iterdir() if path.name not in beginning]


def check(folder: Path, overwrite: bool, ways_on: str) -> None:
    """Raise FolderError where a folder must not be written to; `ways_on` says what to do about an unfinished one."""
    found = folder_status(folder)
    if found == "foreign":
        what = "is not a folder" if not folder.is_dir() else "is not empty and was not made by lora_alpaca"
        raise FolderError(f"--output_dir {folder} {what}; name another folder")
    if found == "unfinished" and not overwrite:
        raise FolderError(f"--output_dir {folder} holds an unfinished run; {ways_on}")
    above = _there(folder)
    if not os.access(above, os.W_OK | os.X_OK):
        raise FolderError(f"--output_dir {folder}: {above} is not writable; name another folder")


def check_space(folder: Path, needed: int) -> None:
    """Raise FolderError where a disk has not so many bytes left."""
    free = shutil.disk_usage(_there(folder)).free
    if free < needed:
        raise FolderError(
            f"--output_dir {folder}: the run writes about {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB "
            "left; free some, lower --save_total_limit, or name another folder"
        )


def _there(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())


def check_lock(folder: Path) -> None:
    """Raise FolderError if a run is at work in a folder."""
    if (folder / LOCK).exists():
        with _alone(folder):
            pass


@contextmanager
def locked_for_run(folder: Path, overwrite: bool, goes_on: bool) -> Iterator[list[str]]:
    """Make room in a checked folder, unless the run in it goes on, and keep others out of it until the context ends.

    Yields what was done, in sentences. Raises FolderError if another process is at work there.
    """
    with ExitStack() as before, ExitStack() as now:
        before.enter_context(_alone(folder))
        said = [] if goes_on else take_over(folder, overwrite)
        if not (folder / LOCK).exists():  # it went aside with what was there
            before.close()
            now.enter_context(_alone(folder))
        yield said


@contextmanager
def disk_errors_named(folder: Path) -> Iterator[None]:
    """Turn what a disk fails with within this context into a FolderError."""
    try:
        with atomic.rust_errors_as_oserror():
            yield
    except FolderError:
        raise
    except OSError as error:
        raise FolderError(
            f"--output_dir {folder}: it could not be written ({error.strerror or error}); free space there, or name "
            "another folder"
        ) from None


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Give `storage.staged(folder)`. Raises FolderError if another process makes the same folder, or the disk fails."""
    with disk_errors_named(folder), ExitStack() as stack:
        yield _entered(stack, atomic.staging_folder(folder), folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        _entered(stack, atomic.locked(folder), folder)
        yield


def _entered(stack: ExitStack, context: AbstractContextManager[Entered], folder: Path) -> Entered:
    with disk_errors_named(folder):
        try:
            return stack.enter_context(context)
        except BlockingIOError as error:
            raise FolderError(
                f"--output_dir {folder}: another run is at work there ({error}); wait for it, or name another folder"
            ) from None


# ------------------------------------------------------------------------------------------------------ making room


def take_over(folder: Path, overwrite: bool) -> list[str]:
    """Make room in a checked folder, set aside a finished run or remove it, and return what was done in sentences."""
    said = []
    if folder_status(folder) != "free":
        if overwrite:
            remove_ours(folder)
            said.append(f"removed the earlier results in {folder}")
        else:
            said.append(f"{folder} holds finished results; they are now in {rename_aside(folder)}")
    atomic.make_folder(folder)
    return said


def rename_aside(path: Path, ending: str = "") -> Path:
    """Rename a folder to the first free of `name.1`, `name.2`, ..., or of `name.ENDING`, `name.ENDING.1`, ..."""
    path = path.resolve()
    name = f"{path.name}.{ending}" if ending else path.name
    number = 0 if ending else 1
    while (aside := path.with_name(f"{name}.{number}" if number else name)).exists():
        number += 1
    atomic.rename(path, aside)
    atomic.remove(aside / LOCK)
    return aside


def remove_ours(folder: Path) -> None:
    """Remove the files that our records list, and then the folders that this leaves empty.

    The record stays, as that of something unfinished, until another one takes its place: the folder is still ours.
    """
    record = read_record(folder)
    atomic.replace(folder / RECORD, atomic.as_json(record | {"status": "unfinished"}))
    for listing in folder.glob(f"checkpoint-*/{MANIFEST}"):
        remove_checkpoint(listing.parent)
    for name in record.get("files", []):
        remove_below(folder, name)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        atomic.remove_if_empty(path)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: the files its manifest lists, and the folder if that was all."""
    manifest = read_json(folder / MANIFEST)
    if not {"step", "files"} <= manifest.keys():
        return  # a manifest, but not one of ours
    for name in [*manifest["files"], MANIFEST]:  # the manifest last: without it the rest would be nobody's
        remove_below(folder, name)
    atomic.remove_if_empty(folder)


def remove_below(folder: Path, name: str) -> None:
    """Remove a file that a record lists, if it is one below the folder of that record."""
    path = folder / name
    if path.resolve().is_relative_to(folder.resolve()) and not path.is_dir():
        atomic.remove(path)


def move_into_place(stage: Path, folder: Path, overwrite: bool) -> list[str]:
    """Let a staged folder appear in its place and return what was done to make room. Nobody sees half of it."""
    said = take_over(folder, overwrite)
    if any(path.name != RECORD for path in folder.iterdir()):  # files of the user's own stay where they are
        coming = read_record(stage) | {"status": "unfinished"}  # the record that counts comes last
        atomic.replace(folder / RECORD, atomic.as_json(coming))
        for path in sorted(stage.iterdir(), key=lambda path: path.name == RECORD):
            atomic.rename(path, folder / path.name)
        os.rmdir(stage)
    else:
        atomic.remove(folder / RECORD)
        os.rmdir(folder)
        atomic.rename(stage, folder)
    return said
