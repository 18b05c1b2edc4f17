"""What do short rows cost on a CPU in 16 bits? python benchmarks/short_rows.py [--rounds N] [--rows FILE]

Two parts. `attention`: forward and backward of one segment of so many tokens, with the heads of three models, as
torch's kernel does it and with our gradients in fp32 (lora_alpaca/engine/attention.py), in microseconds. `steps`: the
gradient of four rows, as `--recipe fast` has them, in milliseconds: as ours does it, with the kernel's own gradients,
with packs of whatever length, and with neither; on the demo base with its rows, and on SmolLM2-135M with --rows, if
`make real` has fetched it. Ways take turns, every turn with rows that no other has seen: shapes are compiled once.

Seconds are of the processor, on one thread; medians of rounds, and of ratios within a round. Writes
benchmarks/results/short_rows-DATE.json; the last line is JSON. Four minutes on a processor that multiplies in bf16,
and ten more with --rows; on another it says nothing of a run, which would compute in fp32.
"""

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import real_model
import torch
from results_file import write
from trainings import encoded

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data import demo_file
from lora_alpaca.data.examples import Example
from lora_alpaca.engine import EngineChoices, attention, fitted
from lora_alpaca.engine.engines import Packed
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec

HEADS = {"the demo base": (6, 6, 32), "SmolLM2-135M": (9, 3, 64), "Llama-2-7B": (32, 32, 128)}  # queries, keys, size
LENGTHS = (20, 50, 90, 128, 192)
BATCH, TURN, WARM = 4, 15, 3  # rows of a step, steps of a turn, turns of each way before those that count
WAYS = {  # whether gradients of attention are in fp32, and whether packs have few lengths
    "ours": (True, True),
    "gradients by the kernel": (False, True),
    "packs of any length": (True, False),
    "neither": (False, False),
}
SPEC = DeviceSpec(torch.device("cpu"), torch.bfloat16, 16)


def precision() -> Any:
    """Return the context of a forward pass."""
    return torch.autocast("cpu", torch.bfloat16)


def seconds_of(work: Callable[[], Any], least: float = 0.2) -> float:
    """Return the processor seconds of one call, the mean of as many as take a moment."""
    work()
    number, begun = 0, time.process_time()
    while (taken := time.process_time() - begun) < least:
        work()
        number += 1
    return taken / number


def segments(rounds: int) -> dict[str, dict[str, Any]]:
    """Return for heads and lengths the microseconds by the kernel and by ours, and the ratio."""
    found: dict[str, dict[str, Any]] = {}
    for model, (heads, groups, size) in HEADS.items():
        for tokens in LENGTHS:
            shapes = [(1, number, tokens, size) for number in (heads, groups, groups)]
            tensors = [torch.randn(shape, dtype=SPEC.dtype, requires_grad=True) for shape in shapes]
            by_output = torch.randn(1, heads, tokens, size, dtype=SPEC.dtype)

            def pass_(tensors: Any = tensors, by_output: Any = by_output) -> Any:
                query, key, value = tensors
                return torch.autograd.grad(attention._attend(query, key, value, None, 0.0, None), tensors, by_output)

            taken: dict[int, list[float]] = {0: [], 10**9: []}
            for _, (limit, seconds) in itertools.product(range(rounds), taken.items()):
                with mock.patch.object(attention, "SHORT", limit):
                    seconds.append(seconds_of(pass_))
            kernel, ours = taken.values()
            found[f"{model}, {tokens} tokens"] = {
                "kernel_us": round(1e6 * statistics.median(kernel)),
                "fp32_us": round(1e6 * statistics.median(ours)),
                "ratio": round(statistics.median(a / b for a, b in zip(kernel, ours, strict=True)), 2),
            }
            print(model, tokens, found[f"{model}, {tokens} tokens"], flush=True)
    return found


@contextmanager
def engine_of(base_model: str, rows: Sequence[Example]) -> Iterator[Packed]:
    """Yield the engine of a base in bf16 with the adapter of `--recipe fast`."""
    torch.manual_seed(0)
    options = FinetuneConfig(lora_dropout=0.0, lora_r=32, lora_alpha=64, lora_target_modules=["all-linear"])
    base = locate_base(base_model)
    model = lora.attach(load_base(base, SPEC)[0], options, base)
    choices = EngineChoices(engine="packed", micro_batch_size=BATCH)
    with fitted(model, choices, SPEC, 0, rows, precision, is_proven=True) as (engine, _):
        assert isinstance(engine, Packed)
        model.train()
        yield engine


def batches(rows: Sequence[Example]) -> Iterator[list[Example]]:
    """Yield batches of rows in ever new orders."""
    draw = random.Random(0)
    while True:
        order = draw.sample(range(len(rows)), len(rows))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            yield [rows[number] for number in order[first : first + BATCH]]


def steps(base_model: str, rows: Sequence[Example], rounds: int) -> dict[str, Any]:
    """Return the milliseconds of a step in every way, and how many times as long as ours it takes."""
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    with engine_of(base_model, rows) as engine:
        feed = batches(rows)
        for number, (name, (in_fp32, few)) in itertools.product(range(WARM + rounds), WAYS.items()):
            of_way = engine if few else replace(engine, multiple=1)
            with mock.patch.object(attention, "SHORT", attention.SHORT if in_fp32 else 0):
                begun = time.process_time()
                for chosen in itertools.islice(feed, TURN):
                    engine.model.zero_grad()
                    for batch in of_way.batches(chosen):
                        with precision():
                            loss = of_way.loss(batch)
                        loss.backward()
                if number >= WARM:
                    taken[name].append((time.process_time() - begun) / TURN)
    found = {
        name: {
            "ms": round(1e3 * statistics.median(seconds), 1),
            "over_ours": round(statistics.median(a / b for a, b in zip(seconds, taken["ours"], strict=True)), 2),
        }
        for name, seconds in taken.items()
    }
    print(base_model, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="Alpaca rows, a JSON list, for SmolLM2-135M")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    models = {"demo": demo_file("train")}
    if asked.rows and real_model.FOLDER.is_dir():
        models[str(real_model.FOLDER)] = asked.rows
    found: dict[str, Any] = {"attention": segments(asked.rounds), "steps": {}}
    for base_model, file in models.items():
        assert file is not None
        rows = list(encoded(file, FinetuneConfig(base_model=base_model, cutoff_len=256)))[:300]
        found["steps"][Path(base_model).name] = steps(base_model, rows, asked.rounds)
    write("short_rows", found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
