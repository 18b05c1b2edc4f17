"""How long the end of a run takes, for a budget that keeps time for it: saving, and the export of --export_dir."""

import time

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.planning.estimate import ModelSize, checkpoint_bytes

SAVING_RATE = 50e6  # bytes a second, until the run has written a checkpoint
EXPORT_RATE = 100e6  # bytes a second of the base: read, merged, written, hashed, flushed, and read again
FIXED = {"saving": 1.0, "report": 3.0, "export": 9.0}  # seconds of imports, of small files and of drawing
WIDTH = 1024  # of the matrices whose product tells how fast the processor is
COMPARED = 512 * 2e8  # tokens x parameters that an export compares, in passes as long as six of fp32


def ending_seconds(config: FinetuneConfig, size: ModelSize) -> dict[str, float]:
    """Return the seconds that `saving`, drawing the `report` and `export` take after the last step of a run.

    For an export the processor is probed.
    """
    written = size.parameters * size.spec.dtype.itemsize if config.tune == "full" else checkpoint_bytes(size)
    export = 0.0
    if config.export_dir:
        compared = min(COMPARED, 512.0 * size.parameters)
        export = FIXED["export"] + 2 * size.parameters / EXPORT_RATE + 6 * 2 * compared / _speed()
    return {
        "saving": FIXED["saving"] + written / SAVING_RATE,
        "report": FIXED["report"] if config.report else 0.0,
        "export": export,
    }


def _speed() -> float:
    """Return the floating point operations per second of an fp32 product on the CPU."""
    matrix = torch.ones(WIDTH, WIDTH)
    matrix @ matrix
    begun = time.perf_counter()
    matrix @ matrix
    return 2 * WIDTH**3 / max(1e-6, time.perf_counter() - begun)
