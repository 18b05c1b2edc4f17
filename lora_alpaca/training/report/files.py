"""The files of a report, in the output folder of a run: each whole or not at all, and none of them of anybody else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import privacy
from lora_alpaca.data import row_losses
from lora_alpaca.errors import DataError, FolderError
from lora_alpaca.storage import atomic
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.training.report.document import MARK

PAGE, TEXT, FACTS, ROWS, RATES = privacy.REPORT
KIND = "report"  # of the facts


def write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a report, which appear one by one, each whole. Raises OSError, FolderError for a file not ours."""
    for name in contents:
        if not is_ours(folder / name):
            raise FolderError(f"{folder / name} was not made by a report; move it away")
    with atomic.staging_folder(folder / KIND) as stage:
        for name, data in contents.items():
            atomic.write(stage / name, data)
        atomic.move_into(folder, stage, contents)


def is_ours(path: Path) -> bool:
    """Return whether a name is free or that of a file of a report, and no link."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return False
    if not path.exists():
        return True
    if path.name == FACTS:
        return read_json(path).get("kind") == KIND
    if path.name == ROWS:
        try:
            row_losses.read(path)
        except DataError:
            return False
        return True
    with open(path, "rb") as file:
        return MARK.encode() in file.read(200)


def clear(folder: Path, run: str) -> None:
    """Remove the report of another run from a folder."""
    if (found := read_json(folder / FACTS)).get("kind") != KIND or found.get("run") == run:
        return
    for name in (PAGE, TEXT, ROWS, RATES, FACTS):  # the facts last: they say whose the others are
        if is_ours(folder / name):
            atomic.remove(folder / name)


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of a folder's report. Raises FolderError where there are none."""
    found = read_json(folder / FACTS)
    if found.get("kind") != KIND or not isinstance(found.get("record"), dict):
        raise FolderError(f"{folder}: {FACTS} is missing or damaged; name the output folder of a run with a report")
    return found
