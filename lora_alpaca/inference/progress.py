"""What is shown while many rows are answered: a bar on a terminal, a line a minute elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

A_MINUTE = 60.0  # seconds


@contextmanager
def counting_rows(total: int, done: int = 0, what: str = "answers") -> Iterator[Callable[[int], None]]:
    """Give a function that is told of every row that is done how many tokens it took, besides `done` earlier ones.

    Rows, tokens/s and the time that is left are shown on stderr.
    """
    began = told = time.monotonic()
    first, tokens = done, 0
    shown = sys.stderr.isatty()
    with tqdm(total=total, initial=done, unit=" rows", desc=what, dynamic_ncols=True, disable=not shown) as bar:

        def advance(more: int) -> None:
            nonlocal done, tokens, told
            done, tokens = done + 1, tokens + more
            now = time.monotonic()
            speed = f"{tokens / max(now - began, 1e-9):,.0f} tokens/s"
            bar.set_postfix_str(speed, refresh=False)
            bar.update()
            if not shown and now - told >= A_MINUTE:
                told = now
                left = tqdm.format_interval((now - began) / (done - first) * (total - done))
                print(f"{what}: {done:,} of {total:,} rows, {speed}, {left} left", file=sys.stderr, flush=True)

        yield advance
