"""How long does the host work for a training step, and how long does the command line take to answer?

python benchmarks/host.py [--quick]: packing 128 rows of 43,000 tokens, the rows of a step out of a million, `--help`,
and `import lora_alpaca`. Seconds are those of the processor on one thread, on an idle machine the same as on the wall:
medians for packing, the best of several new processes for the command line. Rows are random tokens with the shared
preambles of Alpaca data. Writes benchmarks/results/host-DATE.json; the last line is JSON. Half a minute.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from results_file import write

from lora_alpaca.data.examples import Builder, Example, Examples
from lora_alpaca.data.sampler import Sampler
from lora_alpaca.engine.packing import pack, packs

ROOT = Path(__file__).parent.parent
ROWS, ROW_TOKENS, VOCABULARY = 128, 336, 32_000
BUDGETS = (2048, 16384)  # tokens a pack: on a CPU, and the most on a GPU
TARGETS = {"pack_ms": 10, "sampler_ms": 0.1, "help_seconds": 0.4, "import_seconds": 0.2}


def alpaca_like() -> Examples:
    """Return rows of one length that share one of two preambles, 43,008 tokens in all."""
    draw = random.Random(0)

    def tokens(number: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(number)]

    beginning, builder = tokens(10), Builder()
    preambles = [beginning + tokens(18), beginning + tokens(26)]
    for _ in range(ROWS):
        prompt = draw.choice(preambles) + tokens(draw.randint(5, 60))
        builder.add(Example(np.array(prompt + tokens(ROW_TOKENS - len(prompt))), [(len(prompt), ROW_TOKENS)]))
    return builder.build()


def median_ms(work: Callable[[], Any], times: int) -> float:
    """Return the median milliseconds of the processor for some work."""
    found = []
    for _ in range(times):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return 1000 * statistics.median(found)


def packing(times: int) -> dict[str, float]:
    """Return by token budget the milliseconds from prepared rows to the packs of a step."""
    examples = alpaca_like()

    def step(budget: int) -> None:
        rows = [examples[row] for row in range(ROWS)]
        for numbers in packs(rows, budget):
            pack([rows[number] for number in numbers])

    return {f"pack_{budget}_ms": round(median_ms(partial(step, budget), times), 2) for budget in BUDGETS}


def sampling(rows: int) -> dict[str, float]:
    """Return the milliseconds of finding the rows of a step, without and with its share of drawing an epoch's order."""
    sampler = Sampler(np.random.default_rng(0).integers(1, 600, rows), ROWS, seed=0)
    begun = time.process_time()
    sampler.rows(0)
    drawn = time.process_time()
    for step in range(sampler.steps_per_epoch):
        sampler.rows(step)
    steps, draw = time.process_time() - drawn, drawn - begun
    return {
        "sampler_ms": round(1000 * steps / sampler.steps_per_epoch, 4),
        "sampler_with_draw_ms": round(1000 * (steps + draw) / sampler.steps_per_epoch, 4),
        "draw_seconds": round(draw, 2),
    }


def best_seconds(words: list[str], times: int) -> float:
    """Return the shortest processor time of a Python program in a new process."""
    found = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return round(min(found), 3)


def main() -> None:
    """Measure, print what is above its target, and end with the figures in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds, and nothing is written")
    times = 5 if (quick := parser.parse_args().quick) else 50
    figures: dict[str, Any] = packing(times)
    figures["pack_ms"] = max(figures.values())
    figures |= sampling(1_000_000)
    figures["help_seconds"] = best_seconds(["finetune.py", "--help"], max(3, times // 5))
    figures["import_seconds"] = best_seconds(["-c", "import lora_alpaca"], max(3, times // 5))
    for name, target in TARGETS.items():
        print(f"{name:16} {figures[name]:8} (target: below {target})")
    if not quick:
        print(write("host", {"rows": ROWS, "tokens": ROWS * ROW_TOKENS, **figures}))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
