"""What of a run's record is private, and is kept beside it in a file of its own.

Whoever publishes an adapter publishes `lora_alpaca.json`. The paths of a machine and pieces of the rows are therefore
in `lora_alpaca.private.json`: with it a base is found again where it lies, without it the base has to be named. The
report of the run is as private.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from lora_alpaca.storage import output_folder
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.paths import user_path

FILE = output_folder.PRIVATE
REPORT = (
    "report.html",
    "report.md",
    "report.json",
    "row_losses.parquet",
    "learning_rate.svg",
)  # of a run, with rows in it
FILES = (FILE, *REPORT)
ABOUT = "Not to be published: paths of this machine and pieces of the rows. The adapter works without this file."
_PARTS = ("options", "ledger")  # of a record, that are split key by key
_KEYS = ("working_directory",)  # of a record, that are private as a whole
_OPTIONS = (
    "base_model", "data_path", "val_data_path", "prompt_template_name", "output_dir", "cache_dir",
    "export_dir", "init_adapter", "resume_from_checkpoint",
)  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+([:@].*)?")


def published(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as anyone may read it: folders and files by their last names, rows by their number alone."""
    public = {key: value for key, value in record.items() if key not in _KEYS}
    if base := public.get("base_model"):
        public |= {"base_model": _name(base), "base_is_local": os.path.isabs(base) or bool(public.get("base_is_local"))}
    if public.get("adapter"):
        public["adapter"] = _name(public["adapter"])
    if options := public.get("options"):
        public["options"] = options | {name: _names(options[name]) for name in _OPTIONS if options.get(name)}
    if ledger := public.get("ledger"):
        public["ledger"] = {
            key: {"count": value["count"]} if _is_count(value) else value for key, value in ledger.items()
        }
    return public


def private(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `published` leaves out of a record."""
    public = published(record)
    found: dict[str, Any] = {"about": ABOUT, "run": record.get("run"), "base_model": record.get("base_model")}
    found |= {key: record[key] for key in _KEYS if key in record}
    for part in _PARTS:
        found[part] = {key: value for key, value in record.get(part, {}).items() if value != public[part][key]}
    return found


def whole(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the published record of a folder with what is private in it, if that is still there, of the same run."""
    found, record = read_json(folder / FILE), dict(record)
    if not found or found.get("run") != record.get("run"):
        return record
    base = found.get("base_model")
    if isinstance(base, str) and _name(base) == record.get("base_model"):
        record["base_model"] = base
    record |= {key: found[key] for key in _KEYS if isinstance(found.get(key), str)}
    for part in _PARTS:
        if isinstance(found.get(part), dict) and isinstance(record.get(part), dict):
            record[part] = record[part] | found[part]
    return record


def _is_count(value: Any) -> bool:
    return isinstance(value, dict) and "count" in value


def _names(value: str) -> str:
    """Return the last name of each of several paths with commas between; a hub id stays as it is."""
    return ",".join(map(_name, value.split(",")))


def _name(path: str) -> str:
    """Return the last name of a path; a hub id, which names no folder here, stays as it is."""
    if _HUB_ID.fullmatch(path) and not path.startswith(".") and not user_path(path).exists():
        return path
    return PurePath(path).name or path
