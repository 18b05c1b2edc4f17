"""A run before its base is loaded: what `setup.prepare` finds, and all later steps read."""

from dataclasses import dataclass
from typing import Any

from lora_alpaca.artifacts import run_record
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Examples
from lora_alpaca.data.statistics import Statistics
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.planning.estimate import ModelSize
from lora_alpaca.prompts import AnyTemplate


@dataclass(frozen=True)
class Job:
    """Options, base, tokenizer, template and examples of a run, all checked."""

    config: FinetuneConfig
    base: Base
    spec: DeviceSpec
    tokenizer: Any
    template: AnyTemplate
    train: Examples
    validation: Examples
    statistics: Statistics
    size: ModelSize
    hashes: dict[str, str]  # sha256 of base, tokenizer, data and validation split, by their names in the record

    def record(self, world_size: int) -> dict[str, Any]:
        """Return the record of a run of this job that begins."""
        return run_record.describe(
            self.config, self.base, self.spec, self.template, self.statistics, world_size, self.hashes
        )
