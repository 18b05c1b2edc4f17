"""The state of a run: everything that changes from step to step but the weights; checkpoints hold it."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.models.trainable import State


@dataclass
class TrainState:
    """The state of a run after `step` optimizer steps."""

    step: int = 0
    seconds: float = 0.0
    used: float = 0.0  # seconds since the run began, its start included
    spent: float = 0.0  # money, as far as --price_per_hour was known
    first_step_at: float | None = None  # seconds since the run began
    timings: dict[str, float] = field(default_factory=dict)  # seconds that parts of the work took
    validated: int = -1  # the step of the last validation
    first_loss: float | None = None  # of validation, before the first step
    best_loss: float = math.inf
    best_step: int = 0
    without_gain: int = 0  # validations since the best one
    window_loss: float = 0.0  # summed over the labels since the last logged line
    window_labels: int = 0
    overflows: int = 0  # in a row
    skipped: int = 0  # steps whose loss or gradient was not finite
    history: list[dict[str, float]] = field(default_factory=list)
    best: State = field(default_factory=dict)  # the best adapter, unless the checkpoint of `best_step` holds it

    def facts(self) -> dict[str, Any]:
        """Return what fits into JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "best"}

    def mean_loss(self) -> float:
        """Return the mean loss per label since the last logged line."""
        return self.window_loss / max(1, self.window_labels)

    def forget_best(self) -> None:
        """Let the next validation be the best: its rows are not those of the validations before."""
        self.best_loss, self.best_step, self.without_gain, self.best = math.inf, 0, 0, {}

    def result(self, output_dir: Path) -> RunResult:
        """Return the result of the run."""
        validated = self.first_loss is not None
        kept = (self.best_loss if validated else None, self.first_loss, self.best_step if validated else None)
        return RunResult(output_dir, self.step, *kept, seconds=self.seconds, history=self.history)
