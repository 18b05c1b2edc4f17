"""Write the tables of docs/ from the newest results: python benchmarks/tables.py"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / name for name in ("benchmarks.md", "reliability.md")]


def newest(name: str) -> dict[str, Any]:
    """Return the newest figures of a benchmark."""
    return json.loads(max((ROOT / "benchmarks" / "results").glob(f"{name}-[0-9]*.json")).read_text())


def table(figures: dict[str, Any]) -> str:
    """Return the training table of one file: a part for every shape of rows."""
    options, machine = figures["options"], figures["machine"]
    compute = options["compute"].removeprefix("torch.")
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {options['threads']} thread, {compute}; "
        f"width {options['width']}, {options['layers']} layers, vocabulary {options['vocabulary']}; dropout "
        f"{options['dropout']}, train_on_inputs {options['train_on_inputs']}; medians of {options['rounds']} rounds, "
        f"{figures['date']}.",
    ]
    for shape, variants in figures["tables"].items():
        first = next(iter(variants.values()))["seconds"]
        memory = any("alone" in found for found in variants.values())
        lines += [
            "",
            f"| {shape} rows | seconds a step | tokens/s | speed | loss | gradient error |" + " peak MB |" * memory,
        ]
        lines += ["|---|---|---|---|---|---|" + "---|" * memory]
        for name, found in variants.items():
            error = f"{found['gradient_error']:.0e}" if "gradient_error" in found else ""
            cells = [
                name,
                f"{found['seconds']:.2f}",
                str(found["tokens_per_second"]),
                f"{first / found['seconds']:.2f}",
            ]
            cells += [f"{found['loss']:.3f}" if found["loss"] else "", error]
            cells += [str(found["alone"]["peak_megabytes"])] if memory else []
            lines.append("| " + " | ".join(cells) + " |")
        share = variants["ours, unquantised"]["matmul_share"]
        lines += ["", f"The matrix products of a step, timed alone, are {share:.0%} of the step of ours, unquantised."]
    return "\n".join(lines)


def reliability(figures: dict[str, Any]) -> str:
    """Return the tables of one run of the programme of faults."""
    machine, counts = figures["machine"], figures["counts"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {figures['date']}.", ""]
    lines += ["| part | tried | not as promised | minutes |", "|---|---|---|---|"]
    for name, part in figures["parts"].items():
        tried = ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in part["counts"].items() if number)
        lines.append(f"| {name.replace('_', ' ')} | {tried} | {part['failures']} | {part['seconds'] / 60:.1f} |")
    for kind in ("kills", "signals"):
        moments = figures[f"moments of {kind}"]
        lines += ["", f"| {kind} in | " + " | ".join(moments) + " |", "|---|" + "---|" * len(moments)]
        lines += ["| | " + " | ".join(map(str, moments.values())) + " |"]
    lines += ["", "| killed at random, saving after every step | kills | cannot be resumed | another result |"]
    lines += ["|---|---|---|---|"]
    for name, found in figures["figures"]["baseline"].items():
        lines.append(f"| {name} | {found['kills']} | {found['unresumable']} | {found['different']} |")
    large, run = figures["figures"]["cost"].values()
    lines += [
        "",
        f"Of all {counts['kills']} kills, {counts.get('unresumable', 0)} left a run that could not be resumed and "
        f"{counts.get('different', 0)} one that ended differently. {len(figures['catalogue'])} entries of the "
        f"catalogue of bad inputs were tried, in {counts['bad_inputs']} cases: {counts['tracebacks']} tracebacks, "
        f"{counts['silent']} accepted in silence.",
        "",
        f"A checkpoint of a 7B model's adapter ({large['megabytes']} MB with moments and best adapter) took "
        f"{large['seconds']} s, {large['seconds of the processor']} s of them the processor's. On the demo base, "
        f"{run['steps']} steps with a checkpoint every tenth took {run['slower by']:+.1%} in time.",
    ]
    return "\n".join(lines)


def convergence(figures: dict[str, Any]) -> str:
    """Return the final losses of every run, and how far the means are apart."""
    lines, seeds = [], list(next(iter(figures["tasks"].values()))["runs"]["ours"])
    lines.append("| final validation loss | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | range |")
    lines.append("|---" * (len(seeds) + 3) + "|")
    said = []
    for task, found in figures["tasks"].items():
        for name, by in (("ours", "ours"), ("recipe", "alpaca-lora recipe")):
            losses = [*found["final"][name], found["mean"][name], found["range"][name]]
            lines.append(f"| {task}, {by} | " + " | ".join(f"{loss:.5f}" for loss in losses) + " |")
        verdict = "no more than" if found["agree"] else "more than"
        smaller = min(found["range"].values())
        said.append(
            f"On {task} rows the means differ by {found['difference']:.5f}, {verdict} the range, {smaller:.5f}."
        )
    return "\n".join([*lines, "", *said])


FORMS = {"convergence": convergence, "reliability_stress": reliability, "reliability_stress_long": reliability}


def main() -> None:
    """Put every table between its marks."""
    for path in PAGES:
        page = path.read_text()
        for name in re.findall(r"<!-- (\w+) -->", page):
            text = FORMS.get(name, table)(newest(name))
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
            page = re.sub(pattern, lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page, flags=re.S)
        path.write_text(page)


if __name__ == "__main__":
    main()
