"""A run made again from its record: `reproduce` finds what it was made of, trains into a new folder, and compares."""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import privacy
from lora_alpaca.config import FinetuneConfig, ReproduceConfig
from lora_alpaca.config.recorded import FOLDERS, options_of
from lora_alpaca.errors import AdapterError, ConfigError, DataError, ModelError, ReproductionError
from lora_alpaca.storage.json_files import ABSENT, Count, Shape, shape_of_options
from lora_alpaca.storage.output_folder import RECORD, read_record
from lora_alpaca.storage.paths import sha256, user_path
from lora_alpaca.training.reading import RunRows, read_rows

REMEDY = "copy the folder again"
OWN = FOLDERS | {  # options of this command's own, and those that reach beyond the folder of the run
    "trust_remote_code", "cache_dir", "processes", "prompt_template_name", "report_to", "wandb_project",
    "wandb_run_name", "wandb_watch", "wandb_log_model",
}  # fmt: skip
BUDGET = {"max_minutes", "max_cost"}  # what a run took of it is in its plan: as many steps, at the same rates
PATHS = ("base_model", "data_path", "val_data_path", "init_adapter")


class _Result(Shape):
    steps: Count
    first_validation_loss: float | None
    history: list[dict[str, Any]]


class _Plan(Shape):
    rates: list[float] = ABSENT


class _Reproducible(Shape):
    run: str
    base_model: str
    base_revision: str | None
    template: dict[str, Any]
    precision: str
    ranks: int
    options: dict[str, Any]
    said: list[str]
    versions: dict[str, str]
    plan: _Plan = ABSENT
    result: _Result


def reproduce(config: ReproduceConfig) -> None:
    """Train again what a record describes, and print how the two runs compare.

    Raises ReproductionError where they should be the same and are not. What the run was made of must be there:
    ConfigError, DataError and ModelError name what is missing or another one.
    """
    folder = user_path(config.adapter)
    record = read(folder)
    run = options(config, folder, record)
    rows = _rows(run, config, record)
    from lora_alpaca.training.finetuning import train
    from lora_alpaca.training.reproduction import comparison  # torch from here on
    from lora_alpaca.training.reproduction.repetition import Repetition

    made: list[Repetition] = []

    def begin(asked: FinetuneConfig, world: Any) -> Repetition:
        made.append(Repetition(asked, user_path(asked.output_dir), recorded=record, of=config))
        return made[0]

    with ExitStack() as context:
        if config.json:
            context.enter_context(redirect_stdout(sys.stderr))
        result = train(run, rows, begin)
    if os.environ.get("RANK", "0") != "0":
        return
    found = comparison.compare(folder, record, result, made[0].elsewhere)
    print(found.as_json(config) if config.json else found.as_text(config))
    if found.verdict(config.tolerance) == "different":
        raise ReproductionError(f"{config.adapter}: {found.difference(config.tolerance)}")


def read(folder: Path) -> dict[str, Any]:
    """Return the record of a finished run with its private half. Raises AdapterError for what cannot be made again."""
    record = privacy.whole(folder, read_record(folder))
    where = folder / RECORD
    if not record:
        raise AdapterError(f"{folder}: no run of ours is there ({RECORD} is missing or damaged)")
    if record["status"] != "finished":
        raise AdapterError(f"{folder}: this run was never finished; there is nothing to compare with")
    if "run" not in record or "options" not in record:
        raise AdapterError(f"{folder}: no folder of a run; name the output folder of finetune")
    _Reproducible.require(record, where, AdapterError, REMEDY)
    shape_of_options(FinetuneConfig).require(record["options"], f"{where}, options", AdapterError, REMEDY)
    if isinstance(changes := record.get("changes"), list) and changes:
        raise ConfigError(
            f"{folder}: its options were changed when it was resumed ({'; '.join(map(str, changes))}), so that no one "
            "command makes it"
        )
    budget = [f"--{name}" for name in sorted(BUDGET) if record["options"].get(name) is not None]
    if budget and len((record.get("plan") or {}).get("rates", [])) != record["result"]["steps"]:
        raise ConfigError(
            f"{folder}: its steps and their rates were decided by the time that they took ({' and '.join(budget)}), "
            "and its record does not have them"
        )
    for name, digest in weights(record).items():
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name}: missing; {REMEDY}")
        if sha256(folder / name) != digest:
            raise AdapterError(f"{folder / name}: not as it was saved (its sha256 is another); {REMEDY}")
    return record


def weights(record: Mapping[str, Any]) -> dict[str, str]:
    """Return file -> sha256 of the weights that a record is of."""
    found = record.get("weights") or {"adapter_model.safetensors": record.get("adapter_sha256")}
    return {os.path.basename(name): digest for name, digest in found.items()}


def options(config: ReproduceConfig, folder: Path, record: dict[str, Any]) -> FinetuneConfig:
    """Return the options of the run that is made again: those recorded, what they name where it lies now, a new folder.

    A base or a dataset of the hub is that of the recorded commit, and the precision what `auto` was then.
    """
    found: dict[str, Any] = {name: value for name, value in options_of(record).items() if name not in OWN | BUDGET}
    here = str(record.get("working_directory") or "")
    found |= {name: _located(found[name], here) for name in PATHS if found.get(name)}
    if "data_path" in found and isinstance(commits := record.get("data_revisions"), dict):
        found["data_path"] = ",".join(_pinned(part, commits) for part in found["data_path"].split(","))
    found["base_model"] = record["base_model"]
    if record.get("base_is_local") and not os.path.isabs(record["base_model"]) and not config.base_model:
        raise ModelError(
            f"the base of {folder} was a folder named {record['base_model']}, and where it lay is not recorded here; "
            "name it with --base_model"
        )
    if record["base_revision"]:
        found["revision"] = record["base_revision"]
    if record["options"].get("dtype", "auto") == "auto" and "compute_dtype" in record:
        found["dtype"] = record["compute_dtype"]
    found |= {name: getattr(config, name) for name in PATHS if getattr(config, name)}
    if config.base_model:
        found.pop("revision", None)
    if config.trust_remote_code and not config.base_model:
        raise ConfigError("--trust_remote_code runs code of the base: name it too, with --base_model")
    output_dir = config.output_dir or f"{os.path.normpath(folder.absolute())}-reproduced"
    new, old = user_path(output_dir).resolve(), folder.resolve()
    if new.is_relative_to(old) or old.is_relative_to(new):
        raise ConfigError(f"--output_dir {output_dir} is in {folder}, or holds it; name another folder")
    found |= {"device": config.device} if config.device else {}
    found |= {"overwrite": config.overwrite, "trust_remote_code": config.trust_remote_code}
    return FinetuneConfig(output_dir=output_dir, **found)


def _located(value: str, folder: str) -> str:
    """Return paths, with commas between, that are relative to the folder where the run was started, as they are now."""
    parts = []
    for part in value.split(","):
        there = os.path.join(folder, part)
        parts.append(there if folder and not os.path.lexists(part) and os.path.lexists(there) else part)
    return ",".join(parts)


def _pinned(part: str, commits: Mapping[str, Any]) -> str:
    """Return the name of a dataset of the hub with its commit, if it has none and is no file."""
    commit = commits.get(part)
    return f"{part}@{commit}" if isinstance(commit, str) and "@" not in part else part


def _rows(run: FinetuneConfig, config: ReproduceConfig, record: Mapping[str, Any]) -> RunRows:
    """Return the rows of the run, read before torch is imported. Raises DataError that says which ones are needed."""
    try:
        return read_rows(run)
    except DataError as error:
        flag = "val_data_path" if "--val_data_path" in str(error) else "data_path"
        if getattr(config, flag):
            raise
        digest = record.get(flag.replace("path", "sha256"))
        raise DataError(f"{error}; name the rows of the run, of sha256 {str(digest)[:12]}, with --{flag}") from None
