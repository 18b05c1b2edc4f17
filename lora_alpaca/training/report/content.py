"""What a report says: its facts as blocks, in the order in which people ask."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_alpaca.config.recorded import options_of
from lora_alpaca.data.statistics import NOTES, SENTENCES
from lora_alpaca.planning.budget import minutes
from lora_alpaca.training.report import answers, plots, rates
from lora_alpaca.training.report.document import Block, Cards, Code, Heading, Paragraph, Sample, Table

Facts = Mapping[str, Any]
FEWEST_POINTS = 3  # of a curve
HASHES = {
    "run": "run",
    "base_sha256": "base, its config and weights",
    "base_revision": "base, its commit on the hub",
    "tokenizer_sha256": "tokenizer",
    "data_sha256": "training data, all that its rows say",
    "val_data_sha256": "validation data, all that its rows say",
    "validation_sha256": "validation rows as tokens",
}


def document(facts: Facts, output_dir: str) -> tuple[str, list[Block]]:
    """Return the title and the blocks of a report."""
    record = facts["record"]
    options = record["options"]
    title = f"{_name(record['base_model'])} on {_names(options['data_path'])}"
    blocks: list[Block] = [
        Paragraph(_state(facts)),
        Cards(_cards(facts)),
        *_curves(facts),
        *rates.blocks(record),
        *_before_and_after(facts),
        *_which_rows(facts, output_dir),
        *_became(facts),
        *_was_run(facts),
        *_estimated(facts),
        *_receipts(facts),
        Heading("To run it again"),
        Code(command(record)),
    ]
    return title, blocks


def command(record: Facts) -> str:
    """Return the command that a record is of."""
    words = ["lora-alpaca", "finetune"]
    if record["ranks"] > 1:
        words = ["torchrun", f"--nproc_per_node={record['ranks']}", "finetune.py"]
    for name, value in options_of(record).items():
        words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)


# --------------------------------------------------------------------------------------------------------- the top


def _state(facts: Facts) -> str:
    done = f"{facts['step']} of {facts['total_steps']} steps, {minutes(facts['seconds'])}"
    if facts["status"] == "finished":
        early = "" if facts["step"] == facts["total_steps"] else ", stopped early"
        return f"Finished: {done}{early}. The report took {minutes(facts['report_seconds'])} of it."
    return f"Written while the run was under way: {done}."


def _cards(facts: Facts) -> list[tuple[str, str]]:
    validation, history = facts["validation"], facts["history"]
    logged = [entry for entry in history if "loss" in entry]
    cards = []
    if validation["first"] is not None:
        best = "" if validation["best"] is None else f" → {validation['best']:.4f}"
        cards.append(("validation loss", f"{validation['first']:.4f}{best}"))
    if logged:
        cards.append(("training loss", f"{logged[0]['loss']:.4f} → {logged[-1]['loss']:.4f}"))
        speeds = sorted(entry["tokens_per_second"] for entry in logged)
        cards.append(("tokens per second, median", f"{speeds[len(speeds) // 2]:,.0f}"))
        if peak := max(entry.get("memory", 0) for entry in logged):
            cards.append(("memory, at most", f"{peak / 1e9:.2f} GB"))
    cards.append(("rows to train on", f"{facts['record']['ledger']['train']:,}"))
    cards.append(("parameters trained", f"{facts['trainable']:,}"))
    return cards


def _curves(facts: Facts) -> list[Block]:
    history = facts["history"]
    if not history:
        return []
    blocks: list[Block] = [Heading("Curves")]

    def of(name: str, scale: float = 1.0) -> list[tuple[float, float]]:
        found = [(entry["step"], entry[name] / scale) for entry in history if name in entry]
        return [point for point in found if math.isfinite(point[1])]

    validation = of("validation_loss")
    if facts["validation"]["first"] is not None:
        validation = [(0, facts["validation"]["first"]), *validation]
    drawings = [
        ("Loss", {"training": of("loss"), "validation": validation}, "nats per token"),
        ("Learning rate", {"rate": of("learning_rate")}, ""),
        ("Gradient norm, before clipping", {"norm": of("grad_norm")}, ""),
        ("Speed", {"speed": of("tokens_per_second")}, "tokens/s"),
        ("Memory", {"memory": of("memory", 1e9)}, "GB"),
    ]
    if not plots.available():
        blocks.append(Paragraph(plots.MISSING))
    elif _has_curves(facts):
        for title, curves, unit in drawings:
            if shown := {name: points for name, points in curves.items() if points}:
                blocks.append(plots.curve(title, shown, unit))
    return [*blocks, _table_of(history)]


def _has_curves(facts: Facts) -> bool:
    return sum("loss" in entry for entry in facts["history"]) >= FEWEST_POINTS


def _table_of(history: Sequence[Facts]) -> Table:
    """Return about twenty steps of the history as a table, the validations among them."""
    steps = sorted({entry["step"] for entry in history})
    kept = {*steps[:: max(1, len(steps) // 12)], steps[-1]}
    kept |= {entry["step"] for entry in [one for one in history if "validation_loss" in one][-8:]}
    merged: dict[int, dict[str, Any]] = {step: {} for step in sorted(kept)}
    for entry in history:
        if entry["step"] in merged:
            merged[entry["step"]] |= entry
    forms = {
        "loss": ".4f",
        "validation_loss": ".4f",
        "learning_rate": ".2e",
        "grad_norm": ".3f",
        "tokens_per_second": ",.0f",
    }
    rows = [
        [str(step), *(format(entry[name], form) if name in entry else "" for name, form in forms.items())]
        for step, entry in merged.items()
    ]
    head = ["step", "loss", "validation loss", "learning rate", "gradient norm", "tokens/s"]
    return Table(head, rows, frozenset(range(6)))


# ----------------------------------------------------------------------------------------------- before and after


def _before_and_after(facts: Facts) -> list[Block]:
    found, validation = facts.get("answers"), facts["validation"]
    blocks: list[Block] = [Heading("Before and after, on rows held out")]
    lines = []
    if validation["first"] is not None:
        after = "" if validation["best"] is None else f"{validation['best']:.4f} (step {validation['best_step']})"
        count = f"loss of {facts['record']['ledger']['validation']:,} rows, nats per token"
        lines.append([count, f"{validation['first']:.4f}", after])
    if found:
        times = [answers.scores(found["rows"], found[when]) if when in found else {} for when in ("before", "after")]
        lines += _scores(times, len(found["rows"]))
    if not lines:
        return [*blocks, Paragraph("No rows were held out (--val_set_size 0).")]
    blocks.append(Table(["", "before", "after"], lines, frozenset({1, 2})))
    if not found:
        return [
            *blocks,
            Paragraph("No row was answered: the run is short, or --report_answers is 0. It asks for some."),
        ]
    bound = (
        f"Greedy, at most {found['longest']} tokens each: twice the longest answer expected, {answers.LONGEST} at most"
    )
    if found["seconds"] is not None:
        bound += f"; in {found['seconds']:.1f} s, a share of the run's time. --report_answers N answers N rows in full"
    blocks.append(Paragraph(f"{bound}."))
    return [*blocks, *(_sample(found, place) for place in range(len(found["rows"])))]


def _scores(times: Sequence[Facts], rows: int) -> list[list[str]]:
    def line(called: str, name: str, form: str) -> list[str]:
        return [called, *("" if one.get(name) is None else format(one[name], form) for one in times)]

    expected = next((one["expected_tokens"] for one in times if one.get("expected_tokens") is not None), None)
    length = "answer length, tokens" + ("" if expected is None else f" (expected: {expected:.1f})")
    short = max((one.get("short", 0) for one in times), default=0)
    lines = [
        line(f"{rows} answers: ended by themselves", "stopped", ".0%"),
        line(length, "tokens", ".1f"),
        line("repetition: runs of four words said before", "repetition", ".1%"),
    ]
    if short:
        lines.append(line(f"exact match of {short} short answers (up to {answers.SHORT} characters)", "exact", ".0%"))
    return lines


def _sample(found: Facts, place: int) -> Sample:
    row = found["rows"][place]
    texts = [("expected", row["expected"], f"{row['expected_tokens'] + 1} tokens")]
    ends = {"stop": "", "length": ", not at its end", "time": ", cut by the time"}
    for when in ("before", "after"):
        if when in found:
            one = found[when][place]
            same = ", as expected" if one["text"] == row["expected"].strip() else ""
            texts.append((when, one["text"], f"{one['tokens']} tokens{ends[one['ended']]}{same}"))
    return Sample(row["where"], row["prompt"], texts)


# ------------------------------------------------------------------------------------------------------- the rows


def _which_rows(facts: Facts, output_dir: str) -> list[Block]:
    rows, counts = facts["rows"], facts["measured_rows"]
    if not rows["highest"]:
        return []
    said = (
        f"Loss in nats per learned token, of all validation rows and {counts['training']:,} of {counts['of']:,} "
        f"training rows. All of it is in row_losses.parquet; in colour: "
    )
    if facts.get("after_step"):
        said = f"After is step {facts['after_step']}. {said}"
    blocks: list[Block] = [
        Heading("Which rows matter"),
        Paragraph(said),
        Code(shlex.join(["lora-alpaca", "show", "--run", output_dir, "--worst", "20"])),
        Paragraph("Highest loss after training: look here for wrong or misread answers."),
        _rows(rows["highest"]),
    ]
    if rows["lowest"]:
        blocks += [Paragraph("Lowest loss before training: known already, little to learn."), _rows(rows["lowest"])]
    return blocks


def _rows(rows: Sequence[Facts]) -> Table:
    def loss(row: Facts, when: str) -> str:
        return f"{row[when]:.3f}" if when in row else ""

    head = ["row", "", "before", "after", "prompt", "expected"]
    lines = [
        [
            row["where"],
            f"{row['part']}, --row {row['number']}, {row['tokens']} tokens",
            loss(row, "before"),
            loss(row, "after"),
            _clipped(row["prompt"]),
            _clipped(row["expected"]),
        ]
        for row in rows
    ]
    return Table(head, lines, frozenset({2, 3}))


def _became(facts: Facts) -> list[Block]:
    ledger, lengths = facts["record"]["ledger"], facts["lengths"]
    lines = [
        ["rows read", f"{ledger['read']:,}", ", ".join(f"{n:,} {name}" for name, n in ledger["formats"].items())],
        ["to train on", f"{ledger['train']:,}", ""],
        ["to validate on", f"{ledger['validation']:,}", ""],
        ["tokens of the training rows", f"{ledger['tokens']:,}", f"at most {ledger['cutoff_len']} a row"],
        ["of them learned", f"{ledger['learned']:,}", f"{ledger['learned'] / max(1, ledger['tokens']):.1%}"],
        ["of them only seen (masked)", f"{ledger['tokens'] - ledger['learned']:,}", ""],
    ]
    for key, sentence in (SENTENCES | NOTES).items():
        if (found := ledger.get(key) or {"count": 0})["count"]:
            text = sentence.format(cutoff_len=ledger["cutoff_len"], example=found.get("example", ""))
            lines.append([text, f"{found['count']:,}", f"first: {', '.join(found.get('first', []))}"])
    blocks: list[Block] = [Heading("What became of the rows"), Table(["", "", ""], lines, frozenset({1}))]
    if plots.available() and _has_curves(facts):
        title = "Lengths of the training rows, after --cutoff_len"
        blocks.append(plots.histogram(title, lengths["edges"], lengths["counts"], "tokens"))
    said = ", ".join(f"{name} {length}" for name, length in ledger["percentiles"].items())
    return [*blocks, Paragraph(f"Lengths before --cutoff_len, in tokens: {said}.")]


# --------------------------------------------------------------------------------------------------- what was run


def _was_run(facts: Facts) -> list[Block]:
    record = facts["record"]
    options = record["options"]
    lines = [
        ["base", record["base_model"]],
        ["data", options["data_path"]],
        *([["validation data", options["val_data_path"]]] if options["val_data_path"] else []),
        ["template", record["template"].get("name", "")],
        ["tuned", options.get("tune", "lora")],
        ["precision and device", record["precision"]],
        ["processes", str(record["ranks"])],
        ["plan", facts["plan"]],
        ["engine", facts.get("engine", "")],
        *([["", note] for note in facts["notes"]]),
        *[[f"--{name}", str(value)] for name, value in options_of(record).items()],
    ]
    return [Heading("What was run"), Table(["", ""], lines)]


def _estimated(facts: Facts) -> list[Block]:
    """Return what was estimated before the first step, and what was measured."""
    estimate, history = facts.get("estimate") or {}, facts["history"]
    lines = []
    if peak := max((entry.get("memory", 0) for entry in history), default=0):
        lines.append(
            [
                "memory of a device; on a CPU, of this process with its libraries",
                f"{estimate['memory'] / 1e9:.2f} GB" if estimate.get("memory") else "",
                f"{peak / 1e9:.2f} GB",
            ]
        )
    if "seconds" in estimate and facts["status"] == "finished":
        lines.append(
            ["time, by the first pass over some rows", minutes(estimate["seconds"]), minutes(facts["seconds"])]
        )
    if not lines:
        return []
    return [Heading("Estimate against measured"), Table(["", "estimate", "measured"], lines, frozenset({1, 2}))]


def _receipts(facts: Facts) -> list[Block]:
    record = facts["record"]
    lines = [[meaning, str(record[name])] for name, meaning in HASHES.items() if record.get(name)]
    lines += [[f"version of {name}", version] for name, version in record["versions"].items()]
    return [Heading("Receipts"), Paragraph("sha256 of what went in, and versions."), Table(["", ""], lines)]


def _clipped(text: str, most: int = 240) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def _name(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def _names(paths: str) -> str:
    return ", ".join(Path(path).name for path in paths.split(","))
