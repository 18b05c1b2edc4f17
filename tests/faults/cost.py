"""What saving costs: one checkpoint of the size of a 7B model's adapter, and a run with and without checkpoints."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import checkpoint
from lora_alpaca.artifacts.checkpoint import Checkpoint
from lora_alpaca.storage import output_folder

from .report import Report
from .running import forked
from .scene import Scene

LAYERS, WIDTH, RANK = 32, 4096, 8  # of a 7B model with an adapter on q and v
ROUNDS = 3
RUN = {"base_model": "demo", "data_path": "demo", "prompt_template_name": "alpaca", "batch_size": 8, "max_steps": 30,
       "val_set_size": 0, "learning_rate": 1e-3, "save_total_limit": 2, "logging_steps": 30}  # fmt: skip
EVERY = 10  # steps between two checkpoints


def programme(share: float, folder: Path) -> Report:
    """Measure both; the figures depend on machine and disk."""
    report = Report()
    report.figures = {"checkpoint of a 7B adapter": large(folder / "large"), "a run on the demo base": speed(folder)}
    report.count("checkpoints timed", ROUNDS)
    return report


def large(folder: Path) -> dict[str, Any]:
    """Return size and median times of a checkpoint with adapter, moments and best adapter of a 7B model."""
    shapes = {f"layers.{n}.{module}.lora_{part}.weight": shape for n in range(LAYERS) for module in ("q_proj", "v_proj")
              for part, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))}  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    moments = {f"{n}.{kind}": torch.randn(shape, generator=draw) for n, shape in enumerate(shapes.values())
               for kind in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    wall, processor, size = [], [], 0
    folder.mkdir(parents=True)
    for step in range(1, ROUNDS + 1):
        begun = time.monotonic(), time.process_time()
        contents = Checkpoint({"step": step}, state, moments, state)
        where = checkpoint.save(folder, "a run", contents, {})
        wall.append(time.monotonic() - begun[0])
        processor.append(time.process_time() - begun[1])
        size = sum(path.stat().st_size for path in where.iterdir())
        checkpoint.remove(where)
    return {
        "megabytes": round(size / 1e6, 1),
        "seconds": round(statistics.median(wall), 3),
        "seconds of the processor": round(statistics.median(processor), 3),
    }


def speed(folder: Path) -> dict[str, Any]:
    """Return median seconds of a run of many steps with checkpoints and without, taken in turns."""
    scene = Scene(folder / "speed")
    scene.options = scene.options | RUN
    seconds: dict[int, list[float]] = {EVERY: [], 1000: []}
    for _ in range(ROUNDS):
        for every, found in seconds.items():
            out = scene.fresh("timed")
            if (ended := forked(scene, out, save_steps=every).ended()).code != 0:
                raise RuntimeError(ended.last())
            found.append(output_folder.read_record(out)["result"]["seconds"])
    saving, plain = statistics.median(seconds[EVERY]), statistics.median(seconds[1000])
    return {
        "steps": RUN["max_steps"],
        f"seconds, a checkpoint every {EVERY} steps": round(saving, 2),
        "seconds without checkpoints": round(plain, 2),
        "slower by": round(saving / plain - 1, 3),
    }
