"""Does our training end where the alpaca-lora recipe ends? python benchmarks/convergence.py [--rows FILE]

Trains the demo base to convergence on the demo's rows, and on those of FILE (Alpaca rows, a JSON list of which nothing
but losses is written down), with three seeds each: ours, which is `finetune` on an 8-bit base, and the alpaca-lora
recipe, which is transformers' Trainer on an 8-bit base with gradient checkpointing and micro-batches of 4 padded on the
left. Both have the same examples, the same rows in every step, the same first adapter, optimizer, learning rates and
dropout; what differs is how a step is computed, and which places dropout hits. A seed decides on order, first adapter
and dropout, not on the held-out rows. Both compute in fp32, which is the fastest for a model as small as this.

Adapters are taken from both at the same steps and measured in the same way: the mean loss per label on the held-out
rows, by our validation, on one base. The verdict is whether the mean final losses differ by no more than the range
between seeds, the smaller of the two ranges. Writes benchmarks/results/convergence-DATE.json and docs/convergence.svg.
On one thread: eight minutes for the demo, and twenty more for a thousand Alpaca rows.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import curves
import torch
import transformers
from results_file import write
from trainings import MICRO_BATCH, Curve, States, encoded, first_adapter, losses, recipe

from lora_alpaca import FinetuneConfig, data, finetune
from lora_alpaca.artifacts import adapter_folder, checkpoint
from lora_alpaca.data import demo_file
from lora_alpaca.data.examples import Examples
from lora_alpaca.planning.plan import resolve_steps

SEEDS = (42, 1, 2)
HELD_OUT = 100  # rows
POINTS = 10  # of a curve, after the first; one more where the steps do not divide by it
OPTIONS: dict[str, Any] = {"base_model": "demo", "load_8bit": True, "dtype": "fp32", "device": "cpu", "val_set_size": 0}
# that of the demo, which fits the base; epochs and cutoff for Alpaca rows are those of alpaca-lora
RECIPES: dict[str, dict[str, Any]] = {
    "demo": {"learning_rate": 5e-3, "batch_size": 16, "num_epochs": 2},
    "alpaca": {"learning_rate": 5e-3, "batch_size": 16, "num_epochs": 3, "cutoff_len": 256},
}
SUMMARY = ("mean", "range", "difference", "agree")


@dataclass(frozen=True)
class Task:
    """One set of rows to train on, split and encoded once for all runs."""

    name: str
    folder: Path
    train_file: Path
    train: Examples
    validation: Examples

    def config(self, seed: int) -> FinetuneConfig:
        """Return the options of a run of ours, from which the recipe takes what it shares."""
        options: dict[str, Any] = {
            **OPTIONS, **RECIPES[self.name], "data_path": str(self.train_file), "seed": seed,
            "output_dir": str(self.folder / f"ours-{seed}"), "save_total_limit": 2 * POINTS,
        }  # fmt: skip
        total = resolve_steps(FinetuneConfig(**options), len(self.train), 1).total_steps
        every = max(1, total // POINTS)
        return FinetuneConfig(**options, save_steps=every, logging_steps=every)


def task(name: str, file: Path, folder: Path) -> Task:
    """Return the task of a file of rows: split into two files in `folder`, and encoded as `finetune` does it."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    held_out = data.held_out(len(rows), HELD_OUT, seed=0)
    parts: dict[str, list[Any]] = {"train": [], "validation": []}
    for number, row in enumerate(rows):
        parts["validation" if number in held_out else "train"].append(row)
    folder.mkdir()
    examples = {}
    for part, chosen in parts.items():
        path = folder / f"{part}.json"
        path.write_text(json.dumps(chosen), encoding="utf-8")
        examples[part] = encoded(path, FinetuneConfig(**OPTIONS, **RECIPES[name]))
    return Task(name, folder, folder / "train.json", **examples)


# ------------------------------------------------------------------------------------------------ the two trainings


def ours(config: FinetuneConfig) -> tuple[States, Curve]:
    """Train by `finetune`; return its adapters, and the training losses between them."""
    run = finetune(config)
    saved = map(checkpoint.load, run.output_dir.glob("checkpoint-*"))
    states = {checkpoint.facts["step"]: checkpoint.weights for checkpoint in saved}
    states[run.steps] = adapter_folder.read_weights(run.output_dir)
    return states, {int(entry["step"]): entry["loss"] for entry in run.history if "loss" in entry}


# ------------------------------------------------------------------------------------------------------- measuring


def measure(task: Task) -> dict[str, Any]:
    """Return the curves of both on one task, and what they end with."""
    runs: dict[str, dict[str, Any]] = {"ours": {}, "recipe": {}}
    for seed in SEEDS:
        config = task.config(seed)
        first = first_adapter(config)
        for name in runs:
            states, training = ours(config) if name == "ours" else recipe(task.train, config, first, task.folder)
            validation = losses(config, {0: first, **states}, task.validation)
            runs[name][str(seed)] = {"validation": validation, "training": training}
            print(json.dumps({"task": task.name, "by": name, "seed": seed, **runs[name][str(seed)]}), flush=True)
    size = {"rows": len(task.train), "held_out": len(task.validation)}
    return {**size, **RECIPES[task.name], **verdict(runs), "runs": runs}


def verdict(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return mean and range over the seeds of the final losses of both, and whether the means differ by no more."""
    curves_of = {name: [run["validation"] for run in by_seed.values()] for name, by_seed in runs.items()}
    final = {name: [curve[max(curve)] for curve in found] for name, found in curves_of.items()}
    best = {name: [min(curve.values()) for curve in found] for name, found in curves_of.items()}
    mean = {name: statistics.mean(found) for name, found in final.items()}
    spread = {name: max(found) - min(found) for name, found in final.items()}
    difference = abs(mean["ours"] - mean["recipe"])
    return {
        "final": final, "best": best, "mean": mean, "range": spread, "difference": difference,
        "agree": difference <= min(spread.values()),
    }  # fmt: skip


def main() -> None:
    """Train, measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="Alpaca rows, a JSON list, to train on as well")
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    files = {"demo": demo_file("train")} | ({"alpaca": asked.rows} if asked.rows else {})
    with tempfile.TemporaryDirectory() as folder:
        tasks = {name: measure(task(name, file, Path(folder) / name)) for name, file in files.items()}
    write("convergence", {"options": OPTIONS | {"micro_batch_of_recipe": MICRO_BATCH}, "tasks": tasks})
    curves.draw()
    print(json.dumps({name: {key: found[key] for key in SUMMARY} for name, found in tasks.items()}))


if __name__ == "__main__":
    main()
