"""A run before its base is loaded: what `setup` finds, and all later steps read."""

from dataclasses import dataclass
from typing import Any

from lora_alpaca.artifacts import run_record
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Examples
from lora_alpaca.data.statistics import Statistics
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.lora import WEIGHTS
from lora_alpaca.planning.estimate import ModelSize
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage.paths import sha256, user_path
from lora_alpaca.training.reading import RunRows


@dataclass(frozen=True)
class Inputs:
    """Options, rows, base, tokenizer and template of a run: what it is identified by."""

    config: FinetuneConfig
    rows: RunRows
    base: Base
    spec: DeviceSpec
    tokenizer: Any
    tokenizer_sha256: str
    tokenizer_notes: list[str]  # what was amiss with it, and is made good
    template: AnyTemplate

    def record(self, world_size: int, base_sha256: str) -> dict[str, Any]:
        """Return the record of a run of these inputs that begins, but for what becomes of their rows."""
        hashes = {"base_sha256": base_sha256, "tokenizer_sha256": self.tokenizer_sha256, **self.rows.digests}
        if self.config.init_adapter:
            hashes["init_adapter_sha256"] = sha256(user_path(self.config.init_adapter) / WEIGHTS)
        described = run_record.describe(self.config, self.base, self.spec, self.template, world_size, hashes)
        return described | {"tokenizer_notes": self.tokenizer_notes, "data_revisions": self.rows.revisions}


@dataclass(frozen=True)
class Job:
    """Options, base, tokenizer, template and examples of a run, all checked. `record` describes the run."""

    config: FinetuneConfig
    base: Base
    spec: DeviceSpec
    tokenizer: Any
    template: AnyTemplate
    train: Examples
    validation: Examples
    statistics: Statistics
    size: ModelSize
    record: dict[str, Any]
