"""Does a run end in its time, and no worse for it? python benchmarks/budget.py [--minutes M] [--seeds N]

Trains the demo with `--max_minutes`, with validation, saving and `--export_dir`, each seed as a process of its own, all
of them at the same time; then, at the same time again, runs of the same seeds with as many steps as those had, by
`--max_steps`. What counts: the seconds of each process from start to end, the share of the peak that the last rate is,
and the validation losses of both. Writes benchmarks/results/budget-DATE.json; its figures are the last line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results_file import write


def started(folder: Path, seed: int, *words: str) -> subprocess.Popen[str]:
    """Start a run of the demo that writes to a folder."""
    options = [f"--output_dir={folder}", f"--seed={seed}", "--device=cpu"]
    command = [sys.executable, "-m", "lora_alpaca", "finetune", *options, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(runs: dict[int, subprocess.Popen[str]]) -> dict[int, float]:
    """Wait for runs and return how long after this call each of them has ended, in seconds."""
    begun = time.perf_counter()
    found: dict[int, float] = {}
    while len(found) < len(runs):
        for seed, run in runs.items():
            if seed not in found and run.poll() is not None:
                found[seed] = round(time.perf_counter() - begun, 1)
        time.sleep(0.05)
    for run in runs.values():
        if run.returncode:
            raise SystemExit(run.stdout.read() if run.stdout else "")
    return found


def result(folder: Path) -> dict[str, Any]:
    """Return what the record of a finished run says of its result."""
    found = json.loads((folder / "lora_alpaca.json").read_text())["result"]
    rates = [entry["learning_rate"] for entry in found["history"] if "learning_rate" in entry]
    return {
        "steps": found["steps"],
        "validation_loss": round(found["validation_loss"], 4),
        "last_rate_of_peak": round(rates[-1] / 5e-3, 4),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    seeds = range(1, given.seeds + 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        limit = f"--max_minutes={given.minutes}"
        timed = {
            seed: started(folder / f"timed{seed}", seed, limit, f"--export_dir={folder / f'merged{seed}'}")
            for seed in seeds
        }
        seconds = ended(timed)
        merged = [(folder / f"merged{seed}" / "model.safetensors").is_file() for seed in seeds]
        by_time = {seed: result(folder / f"timed{seed}") for seed in seeds}
        steps = {
            seed: started(folder / f"steps{seed}", seed, f"--max_steps={by_time[seed]['steps']}") for seed in seeds
        }
        ended(steps)
        by_steps = {seed: result(folder / f"steps{seed}") for seed in seeds}
    losses = [[by[seed]["validation_loss"] for seed in seeds] for by in (by_time, by_steps)]
    figures = {
        "minutes": given.minutes,
        "runs_at_the_same_time": given.seeds,
        "seconds": list(seconds.values()),
        "merged": all(merged),
        "by_time": [by_time[seed] for seed in seeds],
        "by_steps": [by_steps[seed] for seed in seeds],
        "loss_by_time": round(statistics.mean(losses[0]), 4),
        "loss_by_steps": round(statistics.mean(losses[1]), 4),
    }
    write("budget", figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
