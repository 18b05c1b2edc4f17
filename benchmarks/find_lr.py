"""Does the rate that a search finds, at a tenth of a run's cost, end where the best of a grid ends at full length?

    python benchmarks/find_lr.py [--pairs demo,demo-tenth,demo-fast] [--seeds 1] [--folder FOLDER]
    python benchmarks/find_lr.py --pairs alpaca,chosen --base_model SMOLLM2 --alpaca ROWS.json --preferences PAIRS.json

`alpaca` are 300 rows of a file of Alpaca rows, and `chosen` the first 200 chosen answers of a file of preference pairs;
both are trained for two epochs in the recipe `fast`, in bf16, and judged by 100 rows that follow.

For each pair of a base and rows, and each seed: the search, the full run at the rate that it found, and full runs at a
grid of rates. All on one loaded base, from the same first weights, judged by the same held-out rows. Every result is a
line of FOLDER/find_lr.jsonl, and what is there is not computed again: the benchmark can be stopped and goes on. The
last line printed is JSON.
"""

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.sampler import Sampler
from lora_alpaca.distributed.world import World
from lora_alpaca.models.base import demo_base
from lora_alpaca.training import setup
from lora_alpaca.training.progress import Progress
from lora_alpaca.training.resume import Start
from lora_alpaca.training.search import rate_search
from lora_alpaca.training.search.trials import Trials

GRID = (3e-4, 1e-3, 2e-3, 3.2e-3, 5e-3, 1e-2, 2e-2, 3.2e-2)
FAST_GRID = (1e-4, 3e-4, 1e-3)
FAST: dict[str, Any] = {"recipe": "fast", "num_epochs": 2, "cutoff_len": 256, "dtype": "bf16"}
ROWS = demo_base().parent / "instructions"
PAIRS: dict[str, dict[str, Any]] = {
    "demo": {},
    "demo-tenth": {"data_path": "TENTH", "val_data_path": str(ROWS / "development.json")},
    "demo-fast": {"recipe": "fast"},
    "alpaca": FAST,
    "chosen": FAST,
}
HELD_OUT = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="demo,demo-tenth")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--base_model", metavar="FOLDER", help="of the pairs alpaca and chosen")
    parser.add_argument("--alpaca", type=Path, metavar="FILE", help="Alpaca rows, a JSON list")
    parser.add_argument("--preferences", type=Path, metavar="FILE", help="rows with conversations and a chosen answer")
    asked = parser.parse_args()
    results = Results(asked.folder / "find_lr.jsonl")
    summary = {}
    for pair in asked.pairs.split(","):
        runs = [measured(results, pair, seed, asked) for seed in range(42, 42 + asked.seeds)]
        summary[pair] = runs
        for run in runs:
            print(
                f"{pair}: found {run['found']:g} -> {run['loss']:.5f}; best of the grid {run['best']:g} -> "
                f"{run['best_loss']:.5f}, worst {run['worst_loss']:.3f}; cost {run['share']:.3f} of a run"
            )
    print(json.dumps(summary))


class Results:
    """The lines of a file: what was computed, under a key."""

    def __init__(self, path: Path):
        self._path, self._known = path, dict[str, dict[str, Any]]()
        if path.exists():
            for line in path.read_text().splitlines():
                found = json.loads(line)
                self._known[found["key"]] = found

    def get(self, key: str, compute: Any) -> dict[str, Any]:
        """Return what is known under a key, or else what `compute` returns, which is kept."""
        if key not in self._known:
            self._known[key] = {"key": key, **compute()}
            with open(self._path, "a") as file:
                file.write(json.dumps(self._known[key]) + "\n")
        return self._known[key]


def chosen_rows(pair: str, asked: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Return the rows of a pair that are trained on, and those that judge."""
    if pair == "alpaca":
        rows, size = json.loads(asked.alpaca.read_text(encoding="utf-8")), 300
    else:
        found, size = json.loads(asked.preferences.read_text(encoding="utf-8")), 200
        rows = [{"conversations": [*row["conversations"], row["chosen"]]} for row in found]
    return rows[:size], rows[size : size + HELD_OUT]


def measured(results: Results, pair: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the rate that a search found and its loss at full length, with those of the grid."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as resources:
        said: dict[str, Any] = (
            {"dtype": "fp32", "load_8bit": False} | PAIRS[pair] | {"seed": seed, "output_dir": f"{folder}/out"}
        )
        if pair in ("alpaca", "chosen"):
            for name, rows in zip(("data_path", "val_data_path"), chosen_rows(pair, asked), strict=True):
                said[name] = f"{folder}/{name}.json"
                Path(said[name]).write_text(json.dumps(rows), encoding="utf-8")
            said["base_model"] = asked.base_model
        if said.get("data_path") == "TENTH":
            rows = json.loads((ROWS / "train.json").read_text())
            Path(f"{folder}/tenth.json").write_text(json.dumps(rows[: len(rows) // 10]))
            said["data_path"] = f"{folder}/tenth.json"
        config = FinetuneConfig(**said, learning_rate="auto")
        world = resources.enter_context(World(config))
        progress, start = Progress(quiet=False), Start(config, Path(f"{folder}/out"))
        job = setup.prepare(setup.identify(config, None, world, start, progress), world, progress)
        plan = start.plan(job, world)
        stepper, _ = setup.fit(job, plan, world, resources, progress)
        batch, steps = job.config.batch_size, plan.total_steps
        order = Sampler(job.train.lengths, len(job.train), seed).rows(0)  # of the first epoch, and over again
        rows = [job.train[row] for row in order]

        def full(rate: float) -> dict[str, Any]:
            def compute() -> dict[str, Any]:
                begun = time.process_time()
                loss = Trials(stepper, plan, job.config, rows, list(job.validation)).loss(rate, steps, batch)
                return {"rate": rate, "loss": loss, "seconds": time.process_time() - begun}

            return results.get(f"{pair} {seed} {rate:g}", compute)

        def search() -> dict[str, Any]:
            begun = time.process_time()
            found = rate_search.search(job, plan, stepper, progress)
            return found.facts() | {"rows": found.design.rows, "seconds": time.process_time() - begun}

        found = results.get(f"{pair} {seed} search", search)
        chosen = full(found["rate"])
        grid = [full(rate) for rate in (FAST_GRID if pair in ("alpaca", "chosen") else GRID)]
    best = min(grid, key=lambda one: one["loss"])
    return {
        "seed": seed,
        "found": found["rate"],
        "loss": chosen["loss"],
        "best": best["rate"],
        "best_loss": best["loss"],
        "worst_loss": max(one["loss"] for one in grid),
        "share": found["rows"] / (steps * batch),
        "share_of_seconds": found["seconds"] / chosen["seconds"],
        "steps": steps,
        "batch_size": batch,
    }


if __name__ == "__main__":
    main()
