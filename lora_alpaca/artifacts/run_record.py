"""What an adapter folder remembers, so that nothing has to be said twice: base, template, options, versions.

`lora_alpaca.json` holds it all. Generation and export read it; resuming compares it.
"""

import importlib.metadata
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_alpaca import __version__
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.statistics import Statistics
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage import output_folder

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers")
NOT_THE_RUN = {  # options that change what is shown or where, but no weight
    "output_dir", "resume", "resume_from_checkpoint", "overwrite", "logging_steps", "save_steps", "save_total_limit",
    "cache_dir", "max_truncated", "max_dropped", "max_duplicates", "report_to", "wandb_project", "wandb_run_name",
    "wandb_watch", "wandb_log_model",
    "allow_change", "on_nonfinite", "on_oom", "rank_timeout",
}  # fmt: skip

PATHS = {  # where files are, which does not matter as long as they are the same files
    "base_sha256": ("base_model", "base_revision", "revision"),
    "data_sha256": ("data_path",),
}
THE_RUN = ("base_model", "base_revision", "base_sha256", "tokenizer_sha256", "precision", "ranks", "data_sha256")


@dataclass
class RunResult:
    """What a finished training run gives back.

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


def describe(
    config: FinetuneConfig,
    base: Base,
    base_sha256: str,
    template: AnyTemplate,
    tokenizer_sha256: str,
    spec: DeviceSpec,
    world_size: int,
    data_sha256: str,
    ledger: Statistics,
) -> dict[str, Any]:
    """Return the record of a run that begins: everything that decides its result."""
    return {
        "kind": "adapter",
        "status": "running",
        "run": secrets.token_hex(8),
        "base_model": base.name,
        "base_revision": base.revision,
        "base_sha256": base_sha256,
        "template": template.to_json(),
        "tokenizer_sha256": tokenizer_sha256,
        "precision": str(spec),
        "ranks": world_size,
        "data_sha256": data_sha256,
        "ledger": ledger.to_json(),
        "options": config.model_dump(),
        "said": sorted(config.model_fields_set),
        "versions": versions(),
    }


def differences(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return name -> (before, now) of everything that makes a resumed run another run."""

    def decisive(record: dict[str, Any]) -> dict[str, Any]:
        facts = {key: record.get(key) for key in THE_RUN}
        template = {key: value for key, value in record["template"].items() if key not in ("name", "description")}
        options = {key: value for key, value in record["options"].items() if key not in NOT_THE_RUN}
        return options | facts | {"prompt_template": template}

    before, after = decisive(stored), decisive(now)
    moved = {place for contents, places in PATHS.items() if before[contents] == after[contents] for place in places}
    changed = {key: (value, after.get(key)) for key, value in before.items() if value != after.get(key)}
    return {key: values for key, values in changed.items() if key not in moved}


def finished_run(output_dir: Path) -> RunResult:
    """Return the result that a finished folder remembers."""
    return RunResult(output_dir, **output_folder.read_record(output_dir)["result"])


def versions() -> dict[str, str]:
    """Return the versions of this library and of those that decide its results."""
    return {"lora_alpaca": __version__} | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
