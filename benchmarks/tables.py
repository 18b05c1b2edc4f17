"""Write the tables of docs/ from the newest results: python benchmarks/tables.py"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import gpu

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / name for name in ("benchmarks.md", "cost.md", "reliability.md")]


def newest(name: str) -> dict[str, Any]:
    """Return the newest figures of a benchmark."""
    return json.loads(max((ROOT / "benchmarks" / "results").glob(f"{name}-[0-9]*.json")).read_text())


RATIOS = {
    "vs_alpaca_lora": "8-bit, against the alpaca-lora recipe",
    "vs_trainer_bf16": "bf16, against Trainer",
    "vs_trainer_fp32": "fp32, against Trainer",
    "vs_trl": "unquantised, against TRL packing",
}


def table(figures: dict[str, Any]) -> str:
    """Return the training tables of one file: every shape of rows, and how many times faster ours is than a rival."""
    options, machine = figures["options"], figures["machine"]
    compute = options["compute"].removeprefix("torch.")
    threads = f"{options['threads']} thread" + "s" * (options["threads"] > 1)
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {threads}, {compute}; width {options['width']}, "
        f"{options['layers']} layers, vocabulary {options['vocabulary']}; dropout {options['dropout']}, "
        f"train_on_inputs {options['train_on_inputs']}; medians of {options['rounds']} rounds, {figures['date']}.",
        *ratios(figures["headlines"]),
    ]
    for shape, variants in figures["tables"].items():
        first = next(iter(variants.values()))
        shipped = any("alone" in found for found in variants.values())
        heads = [f"{shape} rows", "seconds a step", "tokens/s", "speed", "loss", "gradient error"]
        heads += ["as shipped: seconds", "speed", "peak MB"] * shipped
        lines += ["", _line(heads), "|" + "---|" * len(heads)]
        for name, found in variants.items():
            cells = [name, f"{found['seconds']:.2f}", str(found["tokens_per_second"])]
            cells += [f"{first['seconds'] / found['seconds']:.2f}", f"{found['loss']:.3f}" if found["loss"] else ""]
            cells += [f"{found['gradient_error']:.0e}" if "gradient_error" in found else ""]
            if shipped and (alone := found.get("alone")):
                speed = first["alone"]["seconds"] / alone["seconds"]
                cells += [f"{alone['seconds']:.2f}", f"{speed:.2f}", str(alone["peak_megabytes"])]
            lines.append(_line(cells + [""] * (len(heads) - len(cells))))
        share = variants["ours, unquantised"]["matmul_share"]
        lines += ["", f"The matrix products of a step, timed alone, are {share:.0%} of the step of ours, unquantised."]
    return "\n".join(lines)


def reliability(figures: dict[str, Any]) -> str:
    """Return the tables of one run of the programme of faults."""
    machine, counts = figures["machine"], figures["counts"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {figures['date']}.", ""]
    lines += ["| part | tried | not as promised | minutes |", "|---|---|---|---|"]
    for name, part in figures["parts"].items():
        name = name.replace("_", " ")
        lines.append(f"| {name} | {_tried(part['counts'])} | {part['failures']} | {part['seconds'] / 60:.1f} |")
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
        f"{run['steps']} steps with a checkpoint every tenth took {round(run['slower by'], 3) + 0.0:+.1%} in time.",
    ]
    return "\n".join(lines)


def _tried(counts: dict[str, int]) -> str:
    """Return counts as words; those of a kind (`kills of copies`) in brackets after the whole (`kills`)."""
    names = [name for name, number in counts.items() if number]
    said = []
    for name in names:
        if any(name.startswith(f"{other} ") for other in names):
            continue
        kinds = [f"{counts[other]} {other[len(name) + 1 :]}" for other in names if other.startswith(f"{name} ")]
        said.append(f"{counts[name]} {name}" + (f" ({', '.join(kinds)})" if kinds else ""))
    return ", ".join(said).replace("_", " ")


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


def ratios(headlines: dict[str, Any]) -> list[str]:
    """Return the lines of a table of ratios: with one allocator setting for all, and each as it is shipped."""
    columns = {f"{shape} rows": found for shape, found in headlines.items()}
    columns |= {
        f"{shape} rows, as shipped": found["as_shipped"] for shape, found in headlines.items() if "as_shipped" in found
    }
    lines = ["", _line(["ours, times faster", *columns]), "|" + "---|" * (len(columns) + 1)]
    for key, what in RATIOS.items():
        values = [found.get(key) for found in columns.values()]
        if any(values):
            lines.append(_line([what, *(f"{value:.2f}" if value else "" for value in values)]))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def generation(figures: dict[str, Any]) -> str:
    """Return tokens a second of every way of answering, and how many times faster ours is."""
    models, machine = figures["models"], figures["machine"]
    ways = dict.fromkeys(way for found in models.values() for way in found["tokens_per_second"])
    lines = [
        f"{machine['gpu'] or machine['cpu']}, {figures['threads']} threads; {figures['tokens']} greedy tokens behind "
        f"{figures['prompt']} random ones; medians of {figures['rounds']} rounds, {figures['date']}.",
        "",
        _line(["tokens/s", *models]),
        "|" + "---|" * (1 + len(models)),
    ]
    for way in ways:
        lines.append(_line([way, *(str(found["tokens_per_second"].get(way, "")) for found in models.values())]))
    for key, words in {
        "vs_upstream": "8-bit, against upstream's defaults (4 beams)",
        "vs_generate": "merged, against `generate`",
        "vs_generate_32": "32 at a time, against `generate` one after another",
        "vs_llamacpp": "against llama.cpp at the same bits, the worse of two",
        "greedy_identical_in_fp32": "greedy ids as transformers', fp32",
    }.items():
        lines.append(_line([words, *(str(found[key]) for found in models.values())]))
    return "\n".join(lines)


def cards(figures: dict[str, Any]) -> str:
    """Return the stages of one card."""
    return gpu.table(figures["stages"])


def estimates(figures: dict[str, Any]) -> str:
    """Return estimated and measured memory and time of every setting."""
    machine, cases = figures["machine"], figures["cases"]
    lines = [
        f"{machine['cpu']}, one thread a rank, processor seconds, {figures['date']}.",
        "",
        _line(["setting", "memory: estimated", "measured", "ratio", "time: estimated", "measured", "ratio"]),
        "|" + "---|" * 7,
    ]
    for name, found in cases.items():
        memory, seconds = found["memory"], found["seconds"]
        sizes = [f"{memory[key] / 1e9:.2f} GB" for key in ("estimated", "measured")]
        times = [f"{seconds[key]:.1f} s" for key in ("estimated", "measured")]
        lines.append(_line([name, *sizes, f"{memory['ratio']:.2f}", *times, f"{seconds['ratio']:.2f}"]))
    return "\n".join(lines)


FORMS = {
    "estimate": estimates,
    "gpu": cards,
    "convergence": convergence,
    "generation": generation,
    "reliability_stress": reliability,
    "reliability_stress_long": reliability,
}


def _between(text: str, marks: re.Match[str]) -> str:
    return f"{marks[1]}{text}\n{marks[2]}"


def main() -> None:
    """Put every table between its marks."""
    for path in PAGES:
        page = path.read_text()
        for name in re.findall(r"<!-- (\w+) -->", page):
            if not list((ROOT / "benchmarks" / "results").glob(f"{name}-[0-9]*.json")):
                continue  # no card has been measured; the costs elsewhere are docs/cost_table.py's
            text = FORMS.get(name, table)(newest(name))
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
            page = re.sub(pattern, partial(_between, text), page, flags=re.S)
        path.write_text(page)


if __name__ == "__main__":
    main()
