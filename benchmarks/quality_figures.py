"""What the runs of benchmarks/quality.py come to: ratios over seeds with their intervals, one table, one picture."""

import json
import random
import statistics
from pathlib import Path
from typing import Any

from quality_tasks import RUNS, TASKS, TRIAL_SEEDS
from results_file import write

TITLES = {"demo": "demo base, its rows", "alpaca": "SmolLM2-135M, 300 Alpaca rows"}


def interval(values: list[float], draws: int = 10_000) -> list[float]:
    """Return the median over seeds, and the bounds of its 95 % bootstrap interval."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return [round(one, 3) for one in (statistics.median(values), medians[draws // 40], medians[-draws // 40])]


def matched(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the exact match of some runs, nothing of a task whose answers are free."""
    found = [run["exact_match"] for run in runs if "exact_match" in run]
    return {"exact_match": interval(found)} if found else {}


def reached(budgets: list[dict[str, Any]], loss: float) -> dict[str, Any] | None:
    """Return the least budget whose run ends with no more than a loss."""
    return next((run for run in sorted(budgets, key=lambda run: run["tokens"]) if run["loss"] <= loss), None)


def prices_of(done: list[dict[str, Any]], task: str) -> tuple[list[float], list[float]]:
    """Return the seconds of a token on Trainer: of runs in the bits of a task, and in 8 where it has others."""
    timed = [run for run in done if run["task"] == task and run["run"].endswith("| trainer")]
    prices: tuple[list[float], list[float]] = ([], [])
    for run in timed:
        prices["load_8bit" in run["options"]].append(run["step"] / run["tokens"])
    return prices


def figures(done: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """Return of every method what it needs for the losses of R0 and R1, as ratios, and what it forgets."""
    runs = [run for run in done if run["task"] == task and run["seed"] in TASKS[task].seeds and "loss" in run]
    prices, prices_in_8_bits = prices_of(done, task)
    references = {(run["method"], run["seed"]): run for run in runs if run["method"] in ("R0", "R1")}
    seeds = sorted({seed for _, seed in references})
    found: dict[str, Any] = {"seeds": seeds, "trainer_ms_per_token": round(1e3 * statistics.median(prices), 4)}
    if prices_in_8_bits:
        found["trainer_8bit_ms_per_token"] = round(1e3 * statistics.median(prices_in_8_bits), 4)
    for name in ("R0", "R1"):
        of = [references[name, seed] for seed in seeds if (name, seed) in references]
        if not of:
            continue
        found[name] = {
            "loss": interval([run["loss"] for run in of]),
            **matched(of),
            "documents": interval([run["documents_after"] / run["documents_before"] for run in of]),
            "seconds": interval([run["step"] for run in of]),
        }
    shipped = [run for run in runs if "num_epochs" not in run["options"]]  # what `finetune` does by itself
    found["shipped"] = {
        method: {
            key: interval([run[key] for run in shipped if run["method"] == method])
            for key in ("loss", "exact_match", "step", "tokens")
        }
        for method in sorted({run["method"] for run in shipped})
    }
    for method in sorted({run["method"] for run in runs if "num_epochs" in run["options"]} - {"R0", "R1"}):
        ratios: dict[str, list[float]] = {}
        chosen = []
        for seed in seeds:
            budgets = [run for run in runs if run["method"] == method and run["seed"] == seed]
            for name, label in (("R0", "recipe"), ("R1", "tuned_recipe")):
                if (of_name := references.get((name, seed))) is None:
                    continue
                if (least := reached(budgets, of_name["loss"])) is None:
                    ratios.setdefault(f"missed_{label}", []).append(seed)
                    continue
                seconds = least["step"] + least["check"]
                shipped = of_name["tokens"] * statistics.median(prices)
                ratios.setdefault(f"vs_{label}", []).append(shipped / seconds)
                if prices_in_8_bits:
                    shipped = of_name["tokens"] * statistics.median(prices_in_8_bits)
                    ratios.setdefault(f"vs_{label}_8bit", []).append(shipped / seconds)
                ratios.setdefault(f"engine_vs_{label}", []).append(of_name["step"] / seconds)
                ratios.setdefault(f"tokens_vs_{label}", []).append(of_name["tokens"] / least["tokens"])
                chosen += [least] if name == "R1" else []
        found[method] = {key: one if key.startswith("missed") else interval(one) for key, one in ratios.items()}
        if chosen:
            found[method] |= {
                "epochs": sorted(run["options"]["num_epochs"] for run in chosen),
                "rate": chosen[0]["options"]["learning_rate"],
                **matched(chosen),
                "documents": interval([run["documents_after"] / run["documents_before"] for run in chosen]),
            }
    return found


def summarise() -> None:
    """Write the figures of all tasks that have final runs, draw them, and print the headline."""
    done = [json.loads(line) for line in RUNS.read_text().splitlines()]
    tasks = {
        name: figures(done, name)
        for name in TASKS
        if any(r["task"] == name and r["seed"] not in TRIAL_SEEDS for r in done)
    }
    trials: dict[str, list[dict[str, Any]]] = {}
    for run in done:
        if run["seed"] in TRIAL_SEEDS and "loss" in run:
            rate, loss = run["options"]["learning_rate"], round(run["loss"], 4)
            trials.setdefault(f"{run['task']} | {run['method']}", []).append({"rate": rate, "loss": loss})
    write("quality", {"tasks": tasks, "trials": trials})
    picture(done)
    print(json.dumps({task: headlines(found) for task, found in tasks.items()}))


def headlines(found: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios of every method of a task, each a median with its interval."""
    keys = ("vs_recipe", "vs_tuned_recipe", "vs_tuned_recipe_8bit", "tokens_vs_tuned_recipe")
    ours = {name: of for name, of in found.items() if isinstance(of, dict) and name not in ("R0", "R1", "shipped")}
    return {name: {key: of[key] for key in keys if key in of} for name, of in ours.items()}


def picture(done: list[dict[str, Any]]) -> None:
    """Draw loss against seconds of every final run: references as shipped, and ours by budget."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "quality", "font.size": 10})
    from matplotlib import pyplot

    tasks = [name for name in TASKS if any(run["task"] == name and run["seed"] not in TRIAL_SEEDS for run in done)]
    colours: dict[str, str] = {}
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4.2), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        prices, _ = prices_of(done, task)
        final = [run for run in done if run["task"] == task and run["seed"] in TASKS[task].seeds and "loss" in run]
        final = [run for run in final if "num_epochs" in run["options"]]
        shown: list[float] = []
        for method in dict.fromkeys(run["method"] for run in final):
            of = [run for run in final if run["method"] == method]
            shipped = method in ("R0", "R1")
            seconds = [r["tokens"] * statistics.median(prices) if shipped else r["step"] + r["check"] for r in of]
            shown += seconds
            label = {"R0": "alpaca-lora (R0)", "R1": "alpaca-lora, rate tuned (R1)"}.get(method, method)
            colour = colours.setdefault(method, f"C{len(colours)}")
            axis.scatter(seconds, [run["loss"] for run in of], s=18, label=label, alpha=0.8, color=colour)
        losses = [run["loss"] for run in final]
        scale = "log" if max(losses) > 3 * min(losses) else "linear"
        axis.set(xscale="log", yscale=scale, title=f"{TITLES[task]}, one dot a run", ylabel="final validation loss")
        axis.set_xlabel("processor seconds of training; R0 and R1 on Trainer")
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if min(shown) / 2 < tick < 2 * max(shown)]
        axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent.parent / "docs" / "quality.svg", metadata={"Date": None})
