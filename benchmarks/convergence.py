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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import curves
import rivals
import torch
import transformers
from results_file import write

from lora_alpaca import FinetuneConfig, data, finetune
from lora_alpaca.artifacts import adapter_folder, checkpoint
from lora_alpaca.data import Rows, demo_file
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Examples
from lora_alpaca.data.preparation import prepare
from lora_alpaca.data.sampler import Sampler
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import EngineChoices, fitted
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import choose_device
from lora_alpaca.models.lora import LoraAdapter
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.models.trainable import State
from lora_alpaca.planning.plan import CPU_TOKENS, resolve
from lora_alpaca.prompts import fitting_template
from lora_alpaca.training.step import Stepper

SEEDS = (42, 1, 2)
HELD_OUT = 100  # rows
POINTS = 10  # of a curve, after the first; one more where the steps do not divide by it
OPTIONS = {"base_model": "demo", "load_8bit": True, "dtype": "fp32", "device": "cpu", "val_set_size": 0}
RECIPES = {  # that of the demo, which fits the base; epochs and cutoff for Alpaca rows are those of alpaca-lora
    "demo": {"learning_rate": 5e-3, "batch_size": 16, "num_epochs": 2},
    "alpaca": {"learning_rate": 5e-3, "batch_size": 16, "num_epochs": 3, "cutoff_len": 256},
}
MICRO_BATCH = 4  # of the alpaca-lora recipe
SUMMARY = ("mean", "range", "difference", "agree")

States = dict[int, State]  # adapters by the number of steps taken
Curve = dict[int, float]  # losses likewise


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
        total = resolve(FinetuneConfig(**options), len(self.train), 1).total_steps
        every = max(1, total // POINTS)
        return FinetuneConfig(**options, save_steps=every, logging_steps=every)


def task(name: str, file: Path, folder: Path) -> Task:
    """Return the task of a file of rows: split into two files in `folder`, and encoded as `finetune` does it."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    held_out = data.held_out(len(rows), HELD_OUT, seed=0)
    parts = {"train": [], "validation": []}
    for number, row in enumerate(rows):
        parts["validation" if number in held_out else "train"].append(row)
    folder.mkdir()
    encoded = {}
    for part, chosen in parts.items():
        path = folder / f"{part}.json"
        path.write_text(json.dumps(chosen), encoding="utf-8")
        encoded[part] = _encoded(path, FinetuneConfig(**OPTIONS, **RECIPES[name]))
    return Task(name, folder, folder / "train.json", **encoded)


def _encoded(path: Path, config: FinetuneConfig) -> Examples:
    rows, tokenizer = Rows(str(path)), load_tokenizer(locate_base(config.base_model))
    template = fitting_template(rows.formats, tokenizer).bound(tokenizer)
    encoder = Encoder.from_options(tokenizer, template, config)
    return prepare(rows, encoder, set(), lambda _: None).train


def start(config: FinetuneConfig) -> State:
    """Return the adapter that `finetune` starts from with a seed."""
    base = locate_base(config.base_model)
    torch.manual_seed(config.seed)
    return lora.state(lora.attach(load_base(base, choose_device(config)[0])[0], config, base))


# ------------------------------------------------------------------------------------------------ the two trainings


def ours(config: FinetuneConfig) -> tuple[States, Curve]:
    """Train by `finetune`; return its adapters, and the training losses between them."""
    run = finetune(config)
    saved = map(checkpoint.load, run.output_dir.glob("checkpoint-*"))
    states = {checkpoint.facts["step"]: checkpoint.adapter for checkpoint in saved}
    states[run.steps] = adapter_folder.read_weights(run.output_dir)
    return states, {entry["step"]: entry["loss"] for entry in run.history if "loss" in entry}


def recipe(task: Task, config: FinetuneConfig, first: State) -> tuple[States, Curve]:
    """Train by the alpaca-lora recipe; return its adapters, and the training losses between them."""
    plan = resolve(config, len(task.train), 1)
    base, spec = locate_base(config.base_model), choose_device(config)[0]
    model = lora.attach(rivals.prepared(load_base(base, spec)[0], "alpaca-lora"), config, base)
    lora.set_state(model, first, "the first adapter")
    optimizer = torch.optim.AdamW(
        lora.trainable_parameters(model), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: plan.learning_rate(step, config) / config.learning_rate
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(task.folder), num_train_epochs=config.num_epochs, max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=config.batch_size // MICRO_BATCH,
        bf16=spec.dtype == torch.bfloat16, use_cpu=True, seed=config.seed, logging_steps=config.logging_steps,
        logging_strategy="steps", save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    order, taken = _Order(task.train, config), _Taken(plan.save_steps)
    trainer = _Trainer(
        model,
        arguments,
        rivals.padded,
        [rivals.vars_of(example) for example in task.train],
        optimizers=(optimizer, schedule),
        callbacks=[taken],
    )
    trainer.order = order
    trainer.train()
    steps = range(plan.total_steps)
    expected = [row for step in steps for row in order.sampler.rows(step)]
    assert order.drawn == expected and trainer.state.global_step == len(steps), "other rows, or in another order"
    taken.states[len(steps)] = lora.state(model)
    return taken.states, {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


class _Trainer(transformers.Trainer):
    """A Trainer that takes the rows in a given order."""

    order: "_Order"

    def _get_train_sampler(self, *_: Any) -> Any:
        return self.order


class _Order(torch.utils.data.Sampler):
    """The row numbers of an epoch, one optimizer step after another, as `finetune` takes them."""

    def __init__(self, train: Examples, config: FinetuneConfig):
        self.sampler, self.epoch = Sampler(train.lengths, config.batch_size, config.seed), 0
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.sampler.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch  # called by the Trainer before every epoch

    def __iter__(self) -> Iterator[int]:
        steps = self.sampler.steps_per_epoch
        for step in range(self.epoch * steps, (self.epoch + 1) * steps):
            for row in self.sampler.rows(step):
                self.drawn.append(row)
                yield row


class _Taken(transformers.TrainerCallback):
    """The adapter as it is after every so many steps."""

    def __init__(self, every: int):
        self.every, self.states = every, {}

    def on_step_end(self, _: Any, state: Any, __: Any, model: Any = None, **___: Any) -> None:
        if state.global_step % self.every == 0:
            self.states[state.global_step] = lora.state(model)


# ------------------------------------------------------------------------------------------------------- measuring


def losses(task: Task, config: FinetuneConfig, states: States) -> Curve:
    """Return the validation loss of adapters by step, each put on one base and measured by our own validation."""
    with World(config) as world:
        base = locate_base(config.base_model)
        model = lora.attach(load_base(base, world.spec)[0], config, base)
        choices = EngineChoices(engine="packed", token_budget=CPU_TOKENS, micro_batch_size=1)
        with fitted(model, choices, world.spec, 0, task.validation, world.autocast) as (engine, _):
            stepper = Stepper(engine, LoraAdapter(model), Replicated(world), world, config, print)
            found = {}
            for step in sorted(states):
                lora.set_state(model, states[step], f"step {step}")
                found[step] = stepper.evaluate(task.validation).loss
            return found


def measure(task: Task) -> dict[str, Any]:
    """Return the curves of both on one task, and what they end with."""
    runs: dict[str, dict[str, Any]] = {"ours": {}, "recipe": {}}
    for seed in SEEDS:
        config = task.config(seed)
        first = start(config)
        for name in runs:
            states, training = ours(config) if name == "ours" else recipe(task, config, first)
            validation = losses(task, config, {0: first, **states})
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
