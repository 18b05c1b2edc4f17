"""Rows a second and memory of reading and encoding, against upstream's per-row map and its batched form.

    python benchmarks/data.py [--rows 52000] [--many 1000000] [--tokenizer FOLDER] [--output FILE]

Rows are made here, as long as Alpaca's: about 120 tokens a row with the template. The three ways are timed in turn,
each in a process of its own, `--rounds` times; what is timed is reading the file and encoding all of it, not the
start of Python. With `--many` rows only ours runs, for its memory. The last line is one JSON object with the ratios.
"""

import argparse
import json
import multiprocessing
import os
import queue
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from lora_alpaca.models.base import demo_base

ROOT = Path(__file__).parent.parent
CUTOFF = 512
WORDS = (ROOT / "README.md").read_text(encoding="utf-8").split()


def write_rows(path: Path, count: int) -> None:
    """Write rows like Alpaca's: 40 % with an input, answers of a few to a few hundred words."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=max(1, words)))

    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number in range(count):
            row = {
                "instruction": text(round(draw.gauss(10, 3))),
                "input": text(round(draw.gauss(10, 5))) if draw.random() < 0.4 else "",
                "output": text(round(draw.expovariate(1 / 28))) + f" {number}.",
            }
            file.write((",\n" if number else "") + json.dumps(row))
        file.write("]")


def ours(data: Path, tokenizer_path: str, folder: Path) -> dict[str, float]:
    """Return seconds, tokens and bytes of reading, checking and encoding a file our way, cache written."""
    from transformers import AutoTokenizer

    from lora_alpaca.config.shared import DataOptions
    from lora_alpaca.data import Rows, held_out
    from lora_alpaca.data.cache import cache_key, cached, keep
    from lora_alpaca.data.encoding import Encoder
    from lora_alpaca.data.preparation import prepare
    from lora_alpaca.data.tokenization import hash_tokenizer
    from lora_alpaca.prompts import load_template

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as our command line has it
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    begun = time.perf_counter()
    rows = Rows(str(data))
    read = time.perf_counter()
    encoder = Encoder.from_options(tokenizer, load_template("alpaca"), DataOptions(cutoff_len=CUTOFF))
    validation = held_out(len(rows), 2000, 42)
    key = cache_key(rows, encoder, validation, hash_tokenizer(tokenizer))
    prepared = keep(folder, key, prepare(rows, encoder, validation, lambda done: None))
    done = time.perf_counter()
    assert cached(folder, key) is not None
    tokens = len(prepared.train.ids) + len(prepared.validation.ids)
    return {
        "seconds": done - begun,
        "reading_seconds": read - begun,
        "cached_seconds": time.perf_counter() - done,
        "tokens": tokens,
        "rows": len(prepared.train) + len(prepared.validation),
    }


def upstream(data: Path, tokenizer_path: str, folder: Path, batched: bool) -> dict[str, float]:
    """Return seconds and tokens of alpaca-lora's way: `datasets`, a split, and a map that tokenises row by row.

    Prompt and answer are one text; with `train_on_inputs` False the prompt is tokenised once more to know its length.
    The batched form is the same with lists of rows.
    """
    import datasets
    from transformers import AutoTokenizer

    from lora_alpaca.prompts import Conversation, load_template

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    template = load_template("alpaca")

    def prompt_of(row: dict[str, str]) -> str:
        return template.prompt(Conversation.of(row["instruction"], row["input"]))[0].text

    def one(row: dict[str, str]) -> dict[str, Any]:
        prompt = prompt_of(row)
        whole = tokenizer(prompt + row["output"], truncation=True, max_length=CUTOFF, padding=False)
        ids, mask = whole["input_ids"], whole["attention_mask"]
        if ids[-1] != tokenizer.eos_token_id and len(ids) < CUTOFF:
            ids, mask = [*ids, tokenizer.eos_token_id], [*mask, 1]
        length = len(tokenizer(prompt, truncation=True, max_length=CUTOFF, padding=False)["input_ids"])
        return {"input_ids": ids, "attention_mask": mask, "labels": [-100] * length + ids[length:]}

    def many(rows: dict[str, list[str]]) -> dict[str, Any]:
        prompts = [
            prompt_of({"instruction": i, "input": n}) for i, n in zip(rows["instruction"], rows["input"], strict=True)
        ]
        texts = [prompt + output for prompt, output in zip(prompts, rows["output"], strict=True)]
        ids = tokenizer(texts, truncation=True, max_length=CUTOFF, padding=False)["input_ids"]
        ids = [row if len(row) >= CUTOFF else [*row, tokenizer.eos_token_id] for row in ids]
        lengths = map(len, tokenizer(prompts, truncation=True, max_length=CUTOFF, padding=False)["input_ids"])
        labels = [[-100] * length + row[length:] for length, row in zip(lengths, ids, strict=True)]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}

    begun = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(data), cache_dir=str(folder))["train"]
    parts = rows.train_test_split(test_size=2000, shuffle=True, seed=42)
    count = tokens = 0
    for part in (parts["train"].shuffle(seed=1), parts["test"].shuffle(seed=1)):
        mapped = part.map(many, batched=True) if batched else part.map(one)
        count += len(mapped)
        tokens += sum(mapped.data.column("input_ids").combine_chunks().value_lengths().to_pylist())
    return {"seconds": time.perf_counter() - begun, "tokens": tokens, "rows": count}


WAYS: dict[str, Callable[[Path, str, Path], dict[str, float]]] = {
    "ours": ours,
    "upstream, row by row": partial(upstream, batched=False),
    "upstream, batched": partial(upstream, batched=True),
}


def _child(way: str, data: Path, tokenizer: str, answers: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = WAYS[way](data, tokenizer, Path(folder))
    answers.put(found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def measure(way: str, data: Path, tokenizer: str) -> dict[str, float]:
    """Return what a way measured in a process of its own, with its peak memory."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_child, args=(way, data, tokenizer, answers))
    child.start()
    while True:
        try:
            found: dict[str, float] = answers.get(timeout=1)
            break
        except queue.Empty:
            if not child.is_alive():
                sys.exit(f"{way}: the process ended with {child.exitcode}")
    child.join()
    return found


def main() -> None:
    """Measure, print a table, and end with the ratios in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--many", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default=str(demo_base()))
    parser.add_argument("--output", type=Path)
    said = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # for the batched form, which it helps
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        write_rows(data, said.rows)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(said.rounds):
            for way in WAYS:
                runs[way].append(measure(way, data, said.tokenizer))
                print(f"round {number + 1}: {way}: {said.rows / runs[way][-1]['seconds']:,.0f} rows/s", flush=True)
        many: dict[str, float] = {}
        if said.many:
            write_rows(data, said.many)
            many = measure("ours", data, said.tokenizer)
    medians = {way: statistics.median(run["seconds"] for run in found) for way, found in runs.items()}
    peaks = {way: max(run["peak_bytes"] for run in found) for way, found in runs.items()}
    print(f"\n{said.rows:,} rows of {runs['ours'][0]['tokens'] / said.rows:.0f} tokens, medians of {said.rounds}")
    for way in WAYS:
        print(f"{way:22} {said.rows / medians[way]:10,.0f} rows/s   peak {peaks[way] / 1e6:6,.0f} MB")
    result: dict[str, Any] = {
        "rows": said.rows,
        "rows_per_second": {way: round(said.rows / seconds) for way, seconds in medians.items()},
        "vs_upstream_rows": round(medians["upstream, row by row"] / medians["ours"], 2),
        "vs_upstream_batched": round(medians["upstream, batched"] / medians["ours"], 2),
        "cached_seconds": round(statistics.median(run["cached_seconds"] for run in runs["ours"]), 3),
        "peak_mb": {way: round(peak / 1e6) for way, peak in peaks.items()},
    }
    if many:
        allowed = 1.5 * 4 * many["tokens"] + 500e6
        result |= {
            "many_rows": said.many,
            "many_seconds": round(many["seconds"], 1),
            "many_token_mb": round(4 * many["tokens"] / 1e6),
            "many_peak_mb": round(many["peak_bytes"] / 1e6),
            "many_peak_of_allowed": round(many["peak_bytes"] / allowed, 3),
        }
    if said.output:
        from results_file import machine  # and torch with it, which no measured process should have

        tokenizer = "demo" if said.tokenizer == str(demo_base()) else Path(said.tokenizer).name
        command = f"python benchmarks/data.py --rows {said.rows} --many {said.many} --rounds {said.rounds}"
        facts = {"command": command, "machine": machine(), "tokenizer": tokenizer}
        kept = {"date": date.today().isoformat(), **facts, **result, "runs": runs}
        said.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
