"""Write the tables of docs/benchmarks.md from the newest results: python benchmarks/tables.py"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"


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


def main() -> None:
    """Put every table between its marks."""
    page = PAGE.read_text()
    for name in re.findall(r"<!-- (\w+) -->", page):
        form = convergence if name == "convergence" else table
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        page = re.sub(
            pattern, lambda found, name=name, form=form: f"{found[1]}{form(newest(name))}\n{found[2]}", page, flags=re.S
        )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
