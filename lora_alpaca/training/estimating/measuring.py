"""The process of a probe: a few layers of the model with random weights, trained for some packs; memory and time.

    python -m lora_alpaca.training.estimating.measuring FOLDER

FOLDER has `job.json`, the base and the rows, as `probe` writes them; `figures.json` is what was found.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Examples
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import Engine, fitted
from lora_alpaca.engine.equivalence import sample
from lora_alpaca.errors import LoraAlpacaError
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.planning.plan import Plan
from lora_alpaca.planning.size import model_size
from lora_alpaca.training import setup
from lora_alpaca.training.estimating.peak import Peak
from lora_alpaca.training.job import Job
from lora_alpaca.training.report import plots
from lora_alpaca.training.step import Stepper

RATE = 1e-6
STEPS = 5  # that are timed, after the first one


class Watch:
    """The most memory that this process held in each phase, and had in use, in bytes, and how long it took."""

    def __init__(self, device: torch.device, clock: Callable[[], float]):
        self._device, self._clock = device, clock
        self.peaks: dict[str, int] = {}
        self.live: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def timed(self, work: Callable[[], Any]) -> float:
        """Return the seconds that some work takes."""
        begun = self._clock()
        work()
        return self._clock() - begun

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Give a context whose peak and time are those of the phase."""
        begun, peak = self._clock(), Peak(self._device)
        with peak:
            yield
        looking = peak.seconds if self._clock is time.process_time else 0.0  # which counts all threads
        self.seconds[name] = self._clock() - begun - looking
        self.peaks[name], self.live[name] = peak.bytes, peak.live


def measure(folder: Path) -> dict[str, Any]:
    """Return what a model takes at one or two depths, the larger first, which alone is checked, and whose peaks count.

    `depths` have `seconds` by phase, and `saved`, the bytes that a batch keeps for its backward pass; `peaks` and
    `live` are bytes by phase, `tokens` those of a step, and `checked` those of the rows that are compared at the start.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config, plan = FinetuneConfig(**job["options"]), Plan(**job["plan"])
    examples = Examples.mapped(folder, "rows")
    with World(config) as world:
        watch = Watch(world.device, getattr(time, job["clock"]))
        imports = time.process_time()
        with watch.phase("start"), suppress(LoraAlpacaError):  # without a tokenizer there is none to count
            load_tokenizer(locate_base(job["base_model"]))
        watch.seconds["start"] = imports
        with watch.phase("report"):
            if config.report and plots.available():
                plots.histogram("", [0.0, 1.0, 2.0], [1, 2], "")
        found: dict[str, Any] = {"depths": []}
        for layers in job["layers"]:
            figures = _trained(folder / str(layers), config, plan, examples, world, watch, is_first=not found["depths"])
            found["depths"].append({"seconds": dict(watch.seconds), "saved": figures.pop("saved")})
            if len(found["depths"]) == 1:
                found |= figures | {"peaks": dict(watch.peaks), "live": dict(watch.live)}
    return found


def _trained(
    folder: Path, config: FinetuneConfig, plan: Plan, examples: Examples, world: World, watch: Watch, is_first: bool
) -> dict[str, Any]:
    """Train a base for some steps; return the size of what was computed."""
    base, strategy, rows = locate_base(str(folder)), Replicated(world), list(examples)
    size = model_size(config, base, world.spec, meta_model(base))
    made = Job(config, base, world.spec, None, None, examples, examples, None, size, {})  # type: ignore[arg-type]
    with ExitStack() as resources:
        with watch.phase("load"):
            trainable, _ = setup.load(made, plan, strategy)
        fitting = fitted(trainable.model, plan, world.spec, 0, examples, world.autocast, not is_first, strategy)
        with watch.phase("check"):
            engine, _ = resources.enter_context(fitting)
        stepper = Stepper(engine, trainable, strategy, world, config, print)
        with watch.phase("first step"):  # it compiles, and makes the moments
            stepper.step(rows, RATE)
        with watch.phase("step"):
            stepper.step(rows, RATE)
        times = [watch.timed(lambda: stepper.step(rows, RATE)) for _ in range(STEPS)]  # and nobody looks at the heap
        watch.seconds["step"] = median(times)  # other work on the machine delays one or the other
        with watch.phase("update"):
            stepper.optimizer.step()
        with watch.phase("validation"):
            stepper.evaluate(rows)
        batches = list(engine.batches(rows))
        return {
            "tokens": sum(batch.input_ids.numel() for batch in batches),
            "checked": sum(len(row.ids) for row in sample(examples)),
            "saved": max(saved_bytes(engine, batch, world) for batch in batches),
        }


def saved_bytes(engine: Engine, batch: Any, world: World) -> int:
    """Return the bytes that autograd keeps of a forward pass for the backward pass, the model's own weights not."""
    own = {part.untyped_storage().data_ptr() for part in (*engine.model.parameters(), *engine.model.buffers())}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    engine.model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), world.autocast():
        engine.loss(batch)
    return sum(found.values())


def main() -> None:
    """Measure what a folder describes."""
    folder, number = Path(sys.argv[1]), sys.argv[2]
    (folder / f"figures-{number}.json").write_text(json.dumps(measure(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
