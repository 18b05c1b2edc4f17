"""Output folders: whose they are, who is at work in them, and what may be done to them.

A folder of ours carries a record, `lora_alpaca.json`: what it holds, whether it is finished, and which files are ours.
Nothing else is ever removed or written over.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from lora_alpaca import storage
from lora_alpaca.errors import FolderError
from lora_alpaca.storage import LOCK

RECORD = "lora_alpaca.json"
CHECKPOINT_FILES = "manifest.json"  # in every checkpoint: its run, its step, and its files with sizes and hashes
Entered = TypeVar("Entered")
Standing = Literal["free", "finished", "unfinished", "foreign"]


# ------------------------------------------------------------------------------------------------------- ownership


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, or an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a folder of ours, or an empty one."""
    record = read_json(folder / RECORD)
    return record if "status" in record else {}


def standing(folder: Path) -> Standing:
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
    found = standing(folder)
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
def occupied(folder: Path, overwrite: bool, goes_on: bool) -> Iterator[list[str]]:
    """Make room in a checked folder, unless the run in it goes on, and keep others out of it until the context ends.

    Yields what was done, in sentences. Raises FolderError if another process is at work there.
    """
    with ExitStack() as before, ExitStack() as now:
        before.enter_context(_alone(folder))
        said = [] if goes_on else claim(folder, overwrite)
        if not (folder / LOCK).exists():  # it went aside with what was there
            before.close()
            now.enter_context(_alone(folder))
        yield said


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what a disk fails with within this context into a FolderError."""
    try:
        with storage.others_write():
            yield
    except FolderError:
        raise
    except OSError as error:
        raise FolderError(
            f"--output_dir {folder}: it could not be written ({error.strerror or error}); free space there, or name "
            "another folder"
        ) from None


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give `storage.staged(folder)`. Raises FolderError if another process makes the same folder, or the disk fails."""
    with writing(folder), ExitStack() as stack:
        yield _entered(stack, storage.staged(folder), folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        _entered(stack, storage.locked(folder), folder)
        yield


def _entered(stack: ExitStack, context: AbstractContextManager[Entered], folder: Path) -> Entered:
    with writing(folder):
        try:
            return stack.enter_context(context)
        except BlockingIOError as error:
            raise FolderError(
                f"--output_dir {folder}: another run is at work there ({error}); wait for it, or name another folder"
            ) from None


# ------------------------------------------------------------------------------------------------------ making room


def claim(folder: Path, overwrite: bool) -> list[str]:
    """Make room in a checked folder, set aside a finished run or remove it, and return what was done in sentences."""
    said = []
    if standing(folder) != "free":
        if overwrite:
            remove_ours(folder)
            said.append(f"removed the earlier results in {folder}")
        else:
            said.append(f"{folder} holds finished results; they are now in {set_aside(folder)}")
    storage.make_folder(folder)
    return said


def set_aside(path: Path, ending: str = "") -> Path:
    """Rename a folder to the first free of `name.1`, `name.2`, ..., or of `name.ENDING`, `name.ENDING.1`, ..."""
    path = path.resolve()
    name = f"{path.name}.{ending}" if ending else path.name
    number = 0 if ending else 1
    while (aside := path.with_name(f"{name}.{number}" if number else name)).exists():
        number += 1
    storage.rename(path, aside)
    storage.remove(aside / LOCK)
    return aside


def remove_ours(folder: Path) -> None:
    """Remove the files that our records list, and then the folders that this leaves empty.

    The record stays, as that of something unfinished, until another one takes its place: the folder is still ours.
    """
    record = read_record(folder)
    storage.replace(folder / RECORD, storage.as_json(record | {"status": "unfinished"}))
    for listing in folder.glob(f"checkpoint-*/{CHECKPOINT_FILES}"):
        remove_checkpoint(listing.parent)
    for name in record.get("files", []):
        remove_below(folder, name)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        storage.remove_if_empty(path)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: the files its manifest lists, and the folder if that was all."""
    manifest = read_json(folder / CHECKPOINT_FILES)
    if not {"step", "files"} <= manifest.keys():
        return  # a manifest, but not one of ours
    for name in [*manifest["files"], CHECKPOINT_FILES]:  # the manifest last: without it the rest would be nobody's
        remove_below(folder, name)
    storage.remove_if_empty(folder)


def remove_below(folder: Path, name: str) -> None:
    """Remove a file that a record lists, if it is one below the folder of that record."""
    path = folder / name
    if path.resolve().is_relative_to(folder.resolve()) and not path.is_dir():
        storage.remove(path)


def publish(stage: Path, folder: Path, overwrite: bool) -> list[str]:
    """Let a staged folder appear in its place and return what was done to make room. Nobody sees half of it."""
    said = claim(folder, overwrite)
    if any(path.name != RECORD for path in folder.iterdir()):  # files of the user's own stay where they are
        coming = read_record(stage) | {"status": "unfinished"}  # the record that counts comes last
        storage.replace(folder / RECORD, storage.as_json(coming))
        for path in sorted(stage.iterdir(), key=lambda path: path.name == RECORD):
            storage.rename(path, folder / path.name)
        os.rmdir(stage)
    else:
        storage.remove(folder / RECORD)
        os.rmdir(folder)
        storage.rename(stage, folder)
    return said
