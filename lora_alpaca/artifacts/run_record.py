"""The record of a run, `lora_alpaca.json`: base, template, options, versions and hashes, and the result at the end.

Generation and export read it; resuming compares it.
"""

import os
import platform
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_alpaca._version import __version__
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.environment import version_of
from lora_alpaca.config.training import RECORDED_FACTS
from lora_alpaca.errors import FolderError, LoraAlpacaError
from lora_alpaca.models import hardware
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage import output_folder
from lora_alpaca.storage.json_files import Count, Shape, shape_of_options

LIBRARIES = (  # that decide its numbers
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "sentencepiece", "jinja2", "numpy",
)  # fmt: skip


@dataclass
class RunResult:
    """The result of a training run.

    `validation_loss` (of the adapter that was kept) and `first_validation_loss` (before the first step) are means per
    learned token, None without a validation split. `history` has a dict per logging interval and per validation.
    """

    output_dir: Path
    steps: int
    validation_loss: float | None
    first_validation_loss: float | None
    best_step: int | None
    seconds: float
    history: list[dict[str, float]]


class _Result(Shape):
    steps: Count
    validation_loss: float | None
    first_validation_loss: float | None
    best_step: Count | None
    seconds: float
    history: list[dict[str, Any]]


class _Finished(Shape):
    result: _Result


class _Ledger(Shape):
    train: Count


class _Compared(Shape):
    run: str
    base_model: str
    template: dict[str, Any]
    options: dict[str, Any]
    said: list[str]
    ledger: _Ledger
    ranks: Count


def require_comparable(record: dict[str, Any], where: object, error: type[LoraAlpacaError], remedy: str) -> None:
    """Raise an error in one line unless a record has what a run that resumes is compared with."""
    _Compared.require(record, where, error, remedy)
    shape_of_options(FinetuneConfig).require(record["options"], f"{where}, options", error, remedy)


def describe(
    config: FinetuneConfig,
    base: Base,
    spec: DeviceSpec,
    template: AnyTemplate,
    world_size: int,
    hashes: dict[str, str | None],
) -> dict[str, Any]:
    """Return the record of a run that begins: everything that identifies it.

    `hashes` are sha256 of base, tokenizer and data, under the names that the record has for them.
    """
    return {
        "kind": "adapter" if config.tune == "lora" else "model",
        "status": "running",
        "run": secrets.token_hex(8),
        "base_model": base.name,
        "base_revision": base.revision,
        "base_stored_as": spec.kind or None,  # where it is stored quantised already
        "template": template.to_json(),
        "precision": str(spec),
        "compute_dtype": spec.dtype_name,
        "ranks": world_size,
        "hardware": hardware.describe(spec.device),  # of the main process
        "working_directory": os.getcwd(),  # which relative paths among the options are of
        "options": config.model_dump(),
        "said": sorted(config.model_fields_set),  # the options that the user set
        "versions": versions(),
    } | hashes


def differences(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return name -> (before, now) of everything that makes a resumed run another run.

    A path or an id may differ, as long as the recorded hash of what it names is equal.
    """
    before, after = identity(stored), identity(now)
    identified = FinetuneConfig.same_if() | {"base_revision": "base_sha256"}
    same = {name for name, fact in identified.items() if before.get(fact) == after.get(fact)}
    changed = {key: (value, after.get(key)) for key, value in before.items() if value != after.get(key)}
    return {key: values for key, values in changed.items() if key not in same}


def identity(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a run is identified by: the options that decide something, and recorded facts.

    An option that came after the record was written had the value that is its default now.
    """
    ignored = FinetuneConfig.deciding("nothing")
    defaults = {key: field.default for key, field in FinetuneConfig.model_fields.items()}
    options = {key: value for key, value in (defaults | record["options"]).items() if key not in ignored}
    facts = {key: record.get(key) for key in ("base_model", *RECORDED_FACTS) if key != "prompt_template"}
    template = {key: value for key, value in record["template"].items() if key not in ("name", "description")}
    return options | facts | {"prompt_template": template}


def finished_run(output_dir: Path) -> RunResult:
    """Return the result that the record of a finished folder holds."""
    record = output_folder.read_record(output_dir)
    where = output_dir / output_folder.RECORD
    _Finished.require(record, where, FolderError, "start anew with --overwrite, or name another folder")
    return RunResult(output_dir, **{name: record["result"][name] for name in _Result.model_fields})


def surroundings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions and the hardware that a record tells: what decides how numbers are rounded."""
    hardware = record.get("hardware")
    found = {**record.get("versions", {}), **(hardware if isinstance(hardware, dict) else {})}
    found.pop("cores", None)
    return {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in found.items()}


def moved(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> sentence for what surrounds a run and is not as it was in another record."""
    return {
        name: f"{name} was {then.get(name, 'not recorded')} and is {value}"
        for name, value in now.items()
        if then.get(name, None) != value
    }


def versions() -> dict[str, str]:
    """Return the versions of this library and of those that decide its results."""
    own = {"lora_alpaca": __version__, "python": platform.python_version()}
    return own | {name: version_of(name) for name in LIBRARIES}
