"""What a run shows while it works: a progress bar on a terminal, one line per logging interval elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from lora_alpaca.errors import visible


class Progress:
    """The output of a run. `quiet` is every rank but the main one."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._total = 0
        self._started = 0.0
        self._first_step = 0

    def log(self, *lines: str) -> None:
        """Print sentences, above the progress bar if there is one; a run is not lost where nothing can be printed."""
        for line in map(visible, lines):
            if self.quiet:
                continue
            try:
                tqdm.write(line, file=sys.stdout) if self._bar is not None else print(line, flush=True)
            except (OSError, ValueError):  # a pipe that nobody reads any more, a full disk, a closed stream
                self.quiet = True

    @contextlib.contextmanager
    def counting(self, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Give a function that takes how many more of `total` are done; a bar shows the count on a terminal."""
        shown = not self.quiet and _on_terminal()
        with tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, disable=not shown, leave=False) as bar:

            def more(done: int) -> None:
                bar.update(done)

            yield more

    def start(self, total_steps: int, step: int) -> None:
        """Begin to count steps and time, from `step` of `total_steps`."""
        self._total, self._first_step, self._started = total_steps, step, time.perf_counter()
        if not self.quiet and _on_terminal():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Move the bar to a finished step; loss, tokens/s and time left are shown in it."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)

    def interval(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Print the figures of a logging interval where no bar shows them."""
        if self._bar is None:
            per_step = (time.perf_counter() - self._started) / max(1, step - self._first_step)
            left = minutes(per_step * (self._total - step))
            self.log(
                f"step {step}/{self._total}  loss {loss:.4f}  rate {learning_rate:.2e}  "
                f"{tokens_per_second:,.0f} tokens/s  {left} left"
            )

    def stop(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _on_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def minutes(seconds: float) -> str:
    """Return a duration as people read it: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
