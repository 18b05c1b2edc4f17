"""Two runs on one page: what differed in options, data and versions, and what came of it."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import privacy
from lora_alpaca.config import CompareConfig
from lora_alpaca.data import row_losses
from lora_alpaca.errors import DataError, FolderError, visible
from lora_alpaca.planning.budget import minutes
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import read_record
from lora_alpaca.storage.paths import user_path
from lora_alpaca.training.report import answers, files, plots
from lora_alpaca.training.report.content import HASHES
from lora_alpaca.training.report.document import Block, Heading, Paragraph, Table, as_page
from lora_alpaca.training.report.redrawing import up_to_date

Facts = Mapping[str, Any]
FACTS = ("base_model", "precision", "ranks", *(name for name in HASHES if name != "run"))
WHERE = {"output_dir", "overwrite", "resume", "resume_from_checkpoint", "allow_change", "cache_dir"}


def compare(config: CompareConfig) -> None:
    """Print how two runs differ, or write it to a page. Raises FolderError where a folder has no report."""
    target = None if config.html is None else user_path(config.html)
    if target is not None and os.path.lexists(target) and not files.is_ours(target):
        raise FolderError(f"--html {target}: there is something else under this name; choose another")
    folders = [user_path(config.run_a), user_path(config.run_b)]
    runs = [up_to_date(files.read_facts(folder), privacy.whole(folder, read_record(folder))) for folder in folders]
    names = [config.run_a, config.run_b]
    title, blocks = f"{names[0]} and {names[1]}", compared(names, runs, folders, target is not None)
    if target is None:
        print(visible("\n\n".join(text for block in blocks if (text := _in_terminal(block)))))
        return
    atomic.replace(target, as_page(title, blocks).encode())
    print(f"the comparison is in {visible(str(target))}")


def _in_terminal(block: Block) -> str:
    """Return a block as people read it in a terminal, its tables with their columns below each other."""
    if not isinstance(block, Table):
        return block.text if isinstance(block, (Heading, Paragraph)) else ""
    lines = [[_clipped(" ".join(cell.split())) for cell in row] for row in (block.head, *block.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _clipped(text: str, most: int = 50) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def compared(names: list[str], runs: Sequence[Facts], folders: list[Path], on_page: bool) -> list[Block]:
    """Return what differed between two runs, and what came of each."""
    head = ["", *names]
    blocks: list[Block] = [Heading("What differed"), _table(head, _differences(runs), "Nothing that is recorded.")]
    blocks += [Heading("What came of it"), Table(["", *names, "change"], _results(runs), frozenset({1, 2, 3}))]
    blocks.append(Paragraph(_row_by_row(runs, folders)))
    if on_page and plots.available():
        for called, key in (("Validation loss", "validation_loss"), ("Training loss", "loss")):
            curves = {name: _points(run, key) for name, run in zip(names, runs, strict=True)}
            if shown := {name: points for name, points in curves.items() if points}:
                blocks.append(plots.curve(called, shown, "nats per token"))
    return blocks


def _points(run: Facts, key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in run["history"] if math.isfinite(entry.get(key, math.nan))]


def _table(head: list[str], rows: list[list[str]], otherwise: str) -> Block:
    return Table(head, rows) if rows else Paragraph(otherwise)


def _differences(runs: Sequence[Facts]) -> list[list[str]]:
    records = [run["record"] for run in runs]
    parts: tuple[tuple[str, list[Facts], set[str]], ...] = (
        ("--{}", [record["options"] for record in records], WHERE),
        ("{}", [{name: record.get(name) for name in FACTS} for record in records], set()),
        ("version of {}", [record["versions"] for record in records], set()),
        ("rows: {}", [_counts(record["ledger"]) for record in records], set()),
        ("template: {}", [record["template"] for record in records], set()),
    )
    lines = []
    for form, (a, b), ignored in parts:
        for name in [name for name in {**a, **b} if name not in ignored and a.get(name) != b.get(name)]:
            lines.append([form.format(name), *(str(one.get(name, "")) for one in (a, b))])
    return lines


def _counts(ledger: Facts) -> dict[str, Any]:
    return {
        name: value["count"] if isinstance(value, dict) and "count" in value else value
        for name, value in ledger.items()
    }


def _results(runs: Sequence[Facts]) -> list[list[str]]:
    def at(path: str) -> Callable[[Facts], float | None]:
        part, name = path.split(".")
        return lambda run: run[part][name]

    def last(name: str) -> Callable[[Facts], float | None]:
        return lambda run: next((entry[name] for entry in reversed(run["history"]) if name in entry), None)

    def score(name: str) -> Callable[[Facts], float | None]:
        def of(run: Facts) -> float | None:
            found = run.get("answers") or {}
            return answers.scores(found["rows"], found["after"])[name] if "after" in found else None

        return of

    measures: list[tuple[str, Callable[[Facts], float | None], str]] = [
        ("validation loss before", at("validation.first"), ".4f"),
        ("validation loss of what was kept", at("validation.best"), ".4f"),
        ("training loss at the end", last("loss"), ".4f"),
        ("steps", lambda run: run["step"], ",.0f"),
        ("tokens/s at the end", last("tokens_per_second"), ",.0f"),
        ("memory at the end, GB", lambda run: (last("memory")(run) or math.nan) / 1e9, ".2f"),
        ("parameters trained", lambda run: run["trainable"], ",.0f"),
        ("answers that ended by themselves", score("stopped"), ".0%"),
        ("answer length, tokens", score("tokens"), ".1f"),
        ("repetition", score("repetition"), ".1%"),
        ("exact match of short answers", score("exact"), ".0%"),
    ]
    lines = []
    for called, measure, form in measures:
        a, b = (_number(measure(run)) for run in runs)
        if a is not None or b is not None:
            change = "" if a is None or b is None else format(b - a, f"+{form}")
            lines.append([called, *("" if one is None else format(one, form) for one in (a, b)), change])
    return [*lines, ["time", *(minutes(run["seconds"]) for run in runs), ""]]


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _row_by_row(runs: Sequence[Facts], folders: list[Path]) -> str:
    """Return how the losses of the validation rows that both runs measured differ, with the standard error."""
    if runs[0]["record"].get("validation_sha256") != runs[1]["record"].get("validation_sha256"):
        return "Their validation rows are not the same, so their validation losses cannot be compared."
    try:
        tables = [row_losses.read(folder / files.ROWS)[0] for folder in folders]
    except DataError as reason:
        return f"No comparison row by row: {reason}."
    a, b = (
        {row.number: row.after for row in table if row.part == "validation" and row.after is not None}
        for table in tables
    )
    changes = [b[number] - a[number] for number in sorted(a.keys() & b.keys())]
    if len(changes) < 2:
        return "No validation row was measured after training in both."
    mean = sum(changes) / len(changes)
    error = math.sqrt(sum((one - mean) ** 2 for one in changes) / (len(changes) - 1) / len(changes))
    lower = sum(one < 0 for one in changes)
    return (
        f"Row by row, on {len(changes):,} validation rows of both: the second run's mean loss per token is "
        f"{mean:+.4f} ± {error:.4f} (standard error); it is lower in {lower:,} rows."
    )
