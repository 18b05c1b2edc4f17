"""How much sooner is a better recipe where the alpaca-lora recipe ends? python benchmarks/quality.py --help

Two references, both trained over three epochs in batches of 128 on q and v in rank 8: R0 with the recipe's own rate of
3e-4, and R1 with the best rate of a grid. A method of ours has the same grid for its rate, in as many trials, and is
then trained for several budgets, each a whole run whose rate lands at its end; none is read off a longer run's curve.
What a method needs, for a seed, is the least budget whose final loss is no more than that of R1 with this seed.

Time is the processor's, on one thread, of optimizer steps alone; ours with the start check. References are also timed
on transformers' Trainer as alpaca-lora's users run them: their loss is that of our engine (benchmarks/convergence.py),
so it is a few whole steps of theirs that are timed, on the very rows, and multiplied. Rates and shapes are chosen by
trials on other seeds than those of the verdict.

Runs are resumable: each leaves a line of JSON in benchmarks/results/quality_runs.jsonl, and what is there is not run
again; two commands may work side by side on other stages or seeds. `--summary` computes the figures from that file,
writes benchmarks/results/quality-DATE.json, and draws docs/quality.svg; the last line is JSON.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quality_figures
from quality_tasks import METHODS, OURS, RECIPE, RUNS, TASKS, TRIAL_SEEDS

# ------------------------------------------------------------------------------------------------------- one run


def child(asked: dict[str, Any]) -> dict[str, Any]:
    """Train one run of ours in this process, and return what it came to."""
    import torch

    from lora_alpaca import FinetuneConfig, finetune
    from lora_alpaca.engine import fitting
    from lora_alpaca.planning.recipes import fill_defaults
    from lora_alpaca.training import setup
    from lora_alpaca.training.step import Step, Stepper

    torch.set_num_threads(1)
    spent = {"step": 0.0, "check": 0.0, "tokens": 0, "steps": 0}
    plain_step, plain_fitted = Stepper.step, fitting.fitted

    def step(self: Stepper, *arguments: Any) -> Step:
        begun = time.process_time()
        done = plain_step(self, *arguments)
        spent["step"] += time.process_time() - begun
        spent["tokens"] += done.tokens
        spent["steps"] += 1
        return done

    class Fitted:
        """The start check, timed."""

        def __init__(self, *arguments: Any):
            self.inner = plain_fitted(*arguments)

        def __enter__(self) -> Any:
            begun = time.process_time()
            entered = self.inner.__enter__()
            spent["check"] += time.process_time() - begun
            return entered

        def __exit__(self, *error: Any) -> Any:
            return self.inner.__exit__(*error)

    Stepper.step, setup.fitted = step, Fitted  # type: ignore[method-assign, assignment, attr-defined]
    result = finetune(FinetuneConfig(**asked["options"]))
    final = [entry["validation_loss"] for entry in result.history if "validation_loss" in entry][-1]
    found = {"loss": final, "first_loss": result.first_validation_loss, **spent}
    if asked["documents"]:
        found |= forgotten(fill_defaults(FinetuneConfig(**asked["options"]), 1)[0], Path(asked["documents"]))
    if asked["final"]:
        found["exact_match"] = exact_match(asked["options"])
    return found


def forgotten(config: Any, documents: Path) -> dict[str, float]:
    """Return the loss on documents that are not of the task, before and after."""
    from trainings import encoded, first_adapter, losses

    from lora_alpaca.artifacts import adapter_folder

    examples = encoded(documents, config)
    states = {0: first_adapter(config), 1: adapter_folder.read_weights(Path(config.output_dir))}
    found = losses(config, states, examples)
    return {"documents_before": found[0], "documents_after": found[1]}


def exact_match(options: dict[str, Any]) -> float:
    """Return the share of the demo's final rows that are answered word for word."""
    from lora_alpaca import GenerateConfig, Generator
    from lora_alpaca.data import Rows, demo_file
    from lora_alpaca.demo.__main__ import LONGEST_ANSWER
    from lora_alpaca.demo.__main__ import exact_match as match

    generator = Generator.load(
        GenerateConfig(lora_weights=options["output_dir"], temperature=0, max_new_tokens=LONGEST_ANSWER)
    )
    return match(generator, list(Rows(str(demo_file("final")))))


def price(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the processor seconds, and the tokens, of whole epochs on Trainer, as alpaca-lora runs them."""
    import rivals
    import torch
    from trainings import encoded, first_adapter, recipe

    from lora_alpaca import FinetuneConfig

    torch.set_num_threads(1)
    config = FinetuneConfig(**asked["options"])
    train = encoded(Path(config.data_path), config)
    watch = rivals.Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe(train, config, first_adapter(config), Path(folder), watch)
    tokens = int(train.lengths.sum() * config.num_epochs)
    return {"step": watch.seconds, "tokens": tokens}


# ---------------------------------------------------------------------------------------------------------- runs


class Runs:
    """The runs that are done, by name, in one file of JSON lines, and how a missing one is made."""

    def __init__(self, folder: Path, rows: Path | None, base: str | None):
        self.folder, self.rows, self.base = folder, rows, base
        lines = RUNS.read_text().splitlines() if RUNS.exists() else []
        self.done = {entry["run"]: entry for entry in map(json.loads, lines)}

    def get(self, task: str, method: str, options: dict[str, Any], seed: int, **asked: Any) -> dict[str, Any]:
        """Return what a run came to, having made it if it is not there."""
        shown = " ".join(f"{name}={value}" for name, value in sorted(options.items()))
        run = f"{task} | {method} | seed {seed} | {shown}" + "".join(f" | {name}" for name in asked if asked[name])
        if run not in self.done:
            begun = time.perf_counter()
            found = self._make(task, options, seed, **asked)
            entry = {"run": run, "task": task, "method": method, "seed": seed, "options": options, **found}
            entry["wall"] = round(time.perf_counter() - begun, 1)
            with RUNS.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            self.done[run] = entry
            print(f"{run}: {json.dumps(found)}", flush=True)
        return self.done[run]

    def _make(
        self, task: str, options: dict[str, Any], seed: int, final: bool = False, trainer: bool = False
    ) -> dict[str, Any]:
        files = self._files(task)
        of_task = TASKS[task].options | ({"base_model": self.base} if task != "demo" else {})
        whole = {
            **of_task, **options, "seed": seed, "data_path": str(files / "train.json"), "device": "cpu",
            "val_data_path": str(files / "validation.json"), "eval_steps": 100_000, "save_steps": 100_000,
            "output_dir": str(files / "out"), "overwrite": True, "report": False, "compile": False, "recheck": True,
        }  # fmt: skip
        documents = str(files / "documents.json") if final else ""
        asked = {"options": whole, "final": final and task == "demo", "documents": documents, "trainer": trainer}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        words = [sys.executable, __file__, "--child", json.dumps(asked)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"a run failed: {json.dumps(asked)}\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def _files(self, task: str) -> Path:
        """Return the folder with the rows of a task, split as always, and with documents that are not of it."""
        folder = self.folder / task
        if folder.exists():
            return folder
        from lora_alpaca.data import demo_file

        source = demo_file("train") if task == "demo" else self.rows
        if source is None or (task != "demo" and not self.base):
            sys.exit("--task alpaca needs --rows FILE and --base_model FOLDER")
        rows, size = json.loads(source.read_text(encoding="utf-8")), TASKS[task]
        random.Random(0).shuffle(rows)
        folder.mkdir(parents=True)
        parts = {"validation": rows[: size.held_out], "train": rows[size.held_out : size.held_out + size.rows]}
        parts["documents"] = [{"text": text} for text in documents(task)]
        for name, chosen in parts.items():
            (folder / f"{name}.json").write_text(json.dumps(chosen), encoding="utf-8")
        return folder


def documents(task: str) -> list[str]:
    """Return texts that are not of the task: of the demo base's own kind, or descriptions of installed packages."""
    from importlib.metadata import distributions

    from lora_alpaca.demo import corpus

    if task == "demo":
        return list(itertools.islice(corpus.documents(seed=77), 200))
    found = sorted((one.name, str(one.metadata["Description"] or "")) for one in distributions())
    return [text[:1000] for _, text in found if len(text) > 1000][:24]


# ------------------------------------------------------------------------------------------------------- the stages


def best_rate(runs: Runs, task: str, method: str, options: dict[str, Any], rates: tuple[float, ...]) -> float:
    """Return the rate of a grid whose runs end with the least mean loss over the seeds of trials."""

    def mean(rate: float) -> float:
        tried = options | {"learning_rate": rate}
        return statistics.mean(runs.get(task, method, tried, seed)["loss"] for seed in TRIAL_SEEDS)

    return min(rates, key=mean)


def reference(runs: Runs, task: str) -> dict[str, Any]:
    """Return the options of R1. Its grid is tried without a warm-up that is longer than the run."""
    plain = {**RECIPE, "warmup_steps": 2}
    return plain | {"learning_rate": best_rate(runs, task, "R1", plain, TASKS[task].reference_rates)}


def tuned(runs: Runs, task: str, method: str, epochs: float) -> dict[str, Any]:
    """Return the options of a method of ours with the best rate for a budget."""
    options = OURS | METHODS[method] | {"num_epochs": epochs}
    return options | {"learning_rate": best_rate(runs, task, method, options, TASKS[task].rates)}


def trials(runs: Runs, task: str, methods: list[str], seeds: tuple[int, ...]) -> None:
    """Try the rates of methods; those of R1 are tried by the stage `reference`, with a grid of the same size."""
    for method in methods:
        tuned(runs, task, method, TASKS[task].budgets[1])


def final(runs: Runs, task: str, methods: list[str], seeds: tuple[int, ...]) -> None:
    """Train references and methods on fresh seeds, interleaved."""
    size = TASKS[task]
    references = {"R0": RECIPE | {"learning_rate": 3e-4}, "R1": reference(runs, task)}
    ours = {method: tuned(runs, task, method, size.budgets[1]) for method in methods}
    for seed in seeds:
        for name, options in references.items():
            if name == "R1" or seed in size.plain:
                runs.get(task, name, options, seed, final=True)
        for method, options in ours.items():
            for epochs in size.budgets:
                runs.get(task, method, options | {"num_epochs": epochs}, seed, final=True)
        if seed in size.priced:
            for bits in ({}, {"load_8bit": True}) if not size.options["load_8bit"] else ({},):
                runs.get(task, "R1", references["R1"] | {"num_epochs": 1} | bits, seed, trainer=True)


def shipped(runs: Runs, task: str, methods: list[str], seeds: tuple[int, ...]) -> None:
    """Train as `finetune` does when nothing is said, which is `make demo`, and with `--recipe fast`, interleaved."""
    for seed in seeds:
        runs.get(task, "nothing said", {}, seed, final=True)
        runs.get(task, "--recipe fast", {"recipe": "fast"}, seed, final=True)


def main() -> None:
    """Run the stages that are asked for, or one run in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=TASKS, default="demo")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="Alpaca rows, a JSON list, for --task alpaca")
    parser.add_argument("--base_model", metavar="FOLDER", help="the base of --task alpaca, such as SmolLM2-135M")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    stages: dict[str, Callable[..., Any]] = {
        "shipped": shipped,
        "reference": lambda runs, task, *_: reference(runs, task),
        "trials": trials,
        "final": final,
    }
    parser.add_argument("--stage", choices=stages, nargs="*", default=["reference", "trials", "final"])
    parser.add_argument("--seeds", type=int, nargs="*", help="of the final runs; else all of the task")
    parser.add_argument("--summary", action="store_true", help="only compute the figures from the runs that are there")
    asked = parser.parse_args()
    if asked.child:
        options = json.loads(asked.child)
        print(json.dumps(price(options) if options["trainer"] else child(options)))
        return
    if asked.summary:
        quality_figures.summarise()
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), asked.rows, asked.base_model)
        for stage in asked.stage:
            stages[stage](runs, asked.task, asked.methods, tuple(asked.seeds or TASKS[asked.task].seeds))


if __name__ == "__main__":
    main()
