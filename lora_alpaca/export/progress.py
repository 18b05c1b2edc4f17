"""What an export shows while it works: a bar with MB/s on a terminal, a line a minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from lora_alpaca.errors import visible

A_MINUTE = 60.0  # seconds


def log(notes: Iterable[str], file: TextIO | None = None) -> None:
    """Print sentences."""
    for note in notes:
        print(visible(note), file=file, flush=True)


@contextmanager
def counting_bytes(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Give a function that takes how many more bytes of `total` are done."""
    began = told = time.monotonic()
    done = 0
    shown = sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not shown, leave=False) as bar:

        def advance(size: int) -> None:
            nonlocal done, told
            done += size
            bar.update(size)
            now = time.monotonic()
            if not shown and now - told >= A_MINUTE:
                told = now
                log([f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {done / 1e6 / (now - began):.0f} MB/s"])

        yield advance
