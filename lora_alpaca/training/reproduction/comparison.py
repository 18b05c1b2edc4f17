"""Two runs that should be one: their tensors, bit for bit, and their losses."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.config import ReproduceConfig
from lora_alpaca.errors import visible
from lora_alpaca.models.shards import Shards

Verdict = Literal["identical", "close", "different"]
ROW = "{:>7}  {:<15}  {:>11}  {:>11}  {:>11}"
LOSSES = ("loss", "validation_loss")
MOST_REASONS = 3  # that a line of error tells


@dataclass(frozen=True)
class Loss:
    """A loss that both runs logged at a step; `kind` is `loss`, of training, or `validation_loss`."""

    step: int
    kind: str
    recorded: float | None
    again: float | None

    @property
    def difference(self) -> float:
        """Return how far apart they are; infinity where one of them is missing or not finite."""
        if self.recorded is None or self.again is None:
            return math.inf
        if self.recorded == self.again or (math.isnan(self.recorded) and math.isnan(self.again)):
            return 0.0
        found = abs(self.again - self.recorded)
        return found if math.isfinite(found) else math.inf


@dataclass(frozen=True)
class Comparison:
    """What came of a run that was made again. `largest` is the largest difference of two numbers in its tensors, and
    `relative` the norm of all differences by that of the recorded tensors.
    """

    output_dir: Path
    tensors: int
    differing: int
    largest: float
    relative: float
    losses: list[Loss]
    elsewhere: dict[str, str]

    def verdict(self, tolerance: float) -> Verdict:
        """Return whether the runs are the same bit for bit, close where no more can be asked, or different."""
        if not self.differing and not any(loss.difference for loss in self.losses):
            return "identical"
        if not self.elsewhere:
            return "different"
        judged = [loss for loss in self.losses if loss.kind == "validation_loss"] or self.losses
        return "close" if all(loss.difference <= tolerance for loss in judged) else "different"

    def difference(self, tolerance: float) -> str:
        """Return in one line what differs."""
        first = next((loss for loss in self.losses if loss.difference), None)
        said = f"{self.differing} of {self.tensors} tensors differ, by up to {self.largest:.1e}"
        if first:
            said += f"; {_named(first.kind)} differs first at step {first.step}"
        if self.elsewhere:
            why = [*self.elsewhere.values()]
            more = f" and {len(why) - MOST_REASONS} more" if len(why) > MOST_REASONS else ""
            return (
                f"made again where not all is as recorded ({'; '.join(why[:MOST_REASONS])}{more}), {said}, and a "
                f"validation loss by more than --tolerance {tolerance:g}"
            )
        return (
            f"made again on the same hardware with the same versions, it is another one ({said}); its record, or the "
            "code, was changed after the run"
        )

    def as_text(self, config: ReproduceConfig) -> str:
        """Return the comparison for a terminal."""
        lines = [ROW.format("step", "", "recorded", "again", "difference")]
        for loss in self.losses:
            if loss.kind == "validation_loss" or loss.difference or len(self.losses) <= 20:
                numbers = (_figure(loss.recorded), _figure(loss.again), f"{loss.difference:.1e}")
                lines.append(ROW.format(loss.step, _named(loss.kind), *numbers))
        what = f"{self.tensors} of {self.tensors} tensors are the same, bit for bit"
        if self.differing:
            what = (
                f"{self.differing} of {self.tensors} tensors differ, by up to {self.largest:.1e}; the norm of all "
                f"differences is {self.relative:.1e} of that of the tensors"
            )
        ends = {
            "identical": "identical",
            "close": f"the same run as far as can be told elsewhere: losses are within {config.tolerance:g}",
            "different": "different",
        }
        verdict = ends[self.verdict(config.tolerance)]
        return visible("\n".join(["", *lines, "", what, f"{config.adapter} and {self.output_dir}: {verdict}"]))

    def as_json(self, config: ReproduceConfig) -> str:
        """Return the comparison for programs."""
        found = {
            "adapter": config.adapter,
            "output_dir": str(self.output_dir),
            "verdict": self.verdict(config.tolerance),
            "tolerance": config.tolerance,
            "elsewhere": self.elsewhere,
            "tensors": self.tensors,
            "differing_tensors": self.differing,
            "largest_difference": _finite(self.largest),
            "relative_difference": _finite(self.relative),
            "losses": [
                {
                    "step": loss.step,
                    "kind": loss.kind,
                    "recorded": _finite(loss.recorded),
                    "again": _finite(loss.again),
                }
                for loss in self.losses
            ],
        }
        return json.dumps(found, indent=2, ensure_ascii=False)


def compare(folder: Path, record: Mapping[str, Any], again: RunResult, elsewhere: dict[str, str]) -> Comparison:
    """Return how a run that was made again compares with the recorded one in a folder."""
    one, other = (Shards(sorted(path.glob("*.safetensors"))) for path in (folder, again.output_dir))
    names = sorted(one.infos.keys() | other.infos.keys())
    differing, largest, squares, norm = 0, 0.0, 0.0, 0.0
    for name in names:
        if name not in one.infos or name not in other.infos or one.infos[name].shape != other.infos[name].shape:
            differing, largest = differing + 1, math.inf
            continue
        a, b = one.read(name), other.read(name)
        norm += float(a.double().square().sum())
        if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            gap = (a.double() - b.double()).abs()
            differing, largest = differing + 1, max(largest, float(gap.max()))
            squares += float(gap.square().sum())
    relative = math.sqrt(squares / norm) if norm else math.inf
    result = record["result"]
    losses = _losses(
        _logged(result["first_validation_loss"], result["history"]),
        _logged(again.first_validation_loss, again.history),
    )
    return Comparison(again.output_dir, len(names), differing, largest, relative, losses, elsewhere)


def _logged(first: float | None, history: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], float]:
    """Return (step, kind) -> loss of all that a run logged."""
    found = {} if first is None else {(0, "validation_loss"): first}
    numbers = [(entry.get("step"), kind, entry.get(kind)) for entry in history for kind in LOSSES]
    return found | {
        (step, kind): float(loss)
        for step, kind, loss in numbers
        if isinstance(step, int) and isinstance(loss, int | float)
    }


def _losses(recorded: Mapping[tuple[int, str], float], again: Mapping[tuple[int, str], float]) -> list[Loss]:
    keys = sorted(recorded.keys() | again.keys())
    return [Loss(*key, recorded.get(key), again.get(key)) for key in keys]


def _named(kind: str) -> str:
    return "validation loss" if kind == "validation_loss" else "training loss"


def _finite(value: float | None) -> float | None:
    """Return a number, or None for what JSON has not."""
    return value if value is not None and math.isfinite(value) else None


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.6f}"
