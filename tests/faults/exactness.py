"""Resuming is exact: stopped by a signal after a step, a run goes on to the same adapter, moments and losses.

Tried for every combination of ranks, step, micro-batches and precision, with dropout on. Two ranks run under torchrun,
all their cases in one pair of processes (see `pair.py`).
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.models import lora
from lora_alpaca.signals import Interrupted

from .library import RUN, STEP, history, stepper, steps_done, wrap
from .report import Report, chosen
from .scene import Scene, forked

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"load_8bit": False},
    "8-bit": {"load_8bit": True},
    "4-bit": {"load_8bit": None, "load_4bit": True},
}
STEPS = {"first": 1, "mid-epoch": 5, "epoch edge": 3, "last": 7}  # of 8 steps, 3 an epoch
CASES = list(product((1, 2), STEPS, (1, 3), PRECISIONS))
OPTIONS = {"batch_size": 6, "max_steps": 8, "save_steps": 4, "val_set_size": 0, "lora_dropout": 0.1}
PAIR = Path(__file__).with_name("pair.py")


def programme(share: float, folder: Path) -> Report:
    """Stop and resume runs: 48 combinations."""
    report, scene = Report(), Scene(folder / "exactness", dict(OPTIONS))
    cases = chosen(CASES, share)
    alone, together = ([case for case in cases if case[0] == ranks] for ranks in (1, 2))
    ended = forked(partial(compare, alone, scene.folder, scene.options), scene.log, 3600) if alone else None
    judge(report, scene, alone, "" if ended is None else ended.last())
    if together:
        (scene.folder / "cases.json").write_text(json.dumps(together))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PAIR)]
        done = subprocess.run(
            [*command, str(scene.folder)], capture_output=True, text=True, timeout=3600, stdin=subprocess.DEVNULL
        )
        judge(report, scene, together, (done.stdout + done.stderr)[-1500:])
    return report


def judge(report: Report, scene: Scene, cases: list[tuple], last_words: str) -> None:
    """Note what the processes found in their cases."""
    for case in cases:
        for rank in range(case[0]):
            found = scene.folder / f"{name(case)} {rank}.json"
            differs = json.loads(found.read_text()) if found.exists() else [f"no result: {last_words}"]
            report.expect(not differs, f"{name(case)}: rank {rank}: {differs}")
        report.count("exact_cases")


def name(case: tuple) -> str:
    """Return a case in words."""
    ranks, step, batches, precision = case
    return f"{ranks} ranks, {step}, {batches} micro-batches, {precision}"


# ------------------------------------------------------------------------------------- in the processes that train


@dataclass
class Watched:
    """The end of every loop in this process, and the step after which a signal comes."""

    stops_after: int = 0
    end: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> None:
        """Look at every loop of this process from now on."""

        def watched_run(run: Any) -> Any:
            def call(loop: Any) -> Any:
                result = run(loop)
                self.end = {
                    "adapter": lora.state(stepper(loop).model),
                    "moments": stepper(loop).optimizer_state(),
                    "losses": [(entry["loss"], entry["grad_norm"]) for entry in history(loop)],
                }
                return result

            return call

        def watched_step(step: Any) -> Any:
            def call(loop: Any) -> None:
                step(loop)
                if steps_done(loop) == self.stops_after:
                    os.kill(os.getpid(), signal.SIGTERM)

            return call

        wrap(RUN, watched_run)
        wrap(STEP, watched_step)


def compare(cases: list[tuple], folder: Path, options: dict[str, Any]) -> None:
    """Stop and resume the runs of these cases, and write for each what differs from the run that was not stopped."""
    watched, wholes = Watched(), {}
    watched.begin()
    rank = int(os.environ.get("RANK", "0"))
    for case in cases:
        ranks, step, batches, precision = case
        engine = {"engine": "packed"} if batches == 1 else {"engine": "padded", "micro_batch_size": 6 // ranks // 3}
        chosen_options = options | engine | PRECISIONS[precision]
        if (batches, precision) not in wholes:
            watched.stops_after = 0
            finetune(config(chosen_options, folder / f"{name((ranks, 'whole', batches, precision))}"))
            wholes[batches, precision] = watched.end
        out = folder / name(case)
        watched.stops_after, watched.end = STEPS[step], {}
        differs = []
        try:
            finetune(config(chosen_options, out))
            differs.append("it was not stopped")
        except Interrupted as stop:
            differs += [str(stop)] * (f"step {STEPS[step]} of 8 is saved" not in str(stop))
        watched.stops_after = 0
        finetune(config(chosen_options | {"resume": True}, out))
        differs += [part for part, before in wholes[batches, precision].items() if not equal(before, watched.end[part])]
        (folder / f"{name(case)} {rank}.json").write_text(json.dumps(differs))


def config(options: dict[str, Any], out: Path) -> FinetuneConfig:
    """Return the options of a run into a folder."""
    said = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return FinetuneConfig(**said | {"output_dir": str(out)})


def equal(one: Any, other: Any) -> bool:
    """Return whether two lists, or two dicts of tensors, are the same to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() != set() and all(torch.equal(one[key], other[key]) for key in one)
    return len(one) > 0 and one == other
