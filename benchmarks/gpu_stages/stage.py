"""Where a stage of gpu.py computes, on models of which size, and how it tells what it has found."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

SHAPES = {  # width, layers, heads, vocabulary; rows of a step and their tokens
    "1b": (2048, 16, 16, 32_000, 32, 512), "7b": (4096, 32, 32, 32_000, 16, 512), "tiny": (64, 2, 4, 512, 4, 48),
}  # fmt: skip


class Stage:
    """Where a stage computes, and what it has found."""

    def __init__(self, name: str, device: str, tiny: str, folder: str):
        self.name, self.tiny, self.folder = name, bool(int(tiny)), Path(folder)
        self.device: Literal["cuda", "cpu"] = "cuda" if device == "cuda" else "cpu"
        self.found: dict[str, Any] = {}

    def tell(self, **figures: Any) -> None:
        """Print all that was found so far."""
        self.found |= figures
        print(json.dumps(self.found), flush=True)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a shape, or the tiny one."""
        return SHAPES["tiny" if self.tiny else name]

    def wait(self) -> None:
        """Wait until the device has computed all that it was given."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def median(self, work: Callable[[], Any], times: int = 5) -> float:
        """Return the median seconds of some work, after two rounds that are not counted."""
        seconds = []
        for _ in range(2 + times):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[2:])

    def command(self, *words: Any) -> list[str]:
        """Return a command line of ours on the device of the stage."""
        return [sys.executable, "-m", "lora_alpaca", *map(str, words), "--device", self.device]

    def adapter(self) -> Path:
        """Return an adapter of the demo's: that of the stage `resume`, or a new one."""
        folder = self.folder / "whole"
        if not (folder / "adapter_model.safetensors").exists():
            words = ["finetune", "--max_steps", 2, "--val_set_size", 0, "--compile", "False", "--output_dir", folder]
            subprocess.run(self.command(*words), check=True, stdout=subprocess.DEVNULL)
        return folder
