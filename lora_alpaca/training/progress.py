"""What a run shows while it works: a bar that moves by rows on a terminal, a line at least once a minute elsewhere.

The line comes from a thread, so it comes too where one batch, a load or a save takes minutes. The thread only reads
what the run has noted on the host: it never waits for a device.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tqdm import tqdm

from lora_alpaca.errors import visible
from lora_alpaca.planning.budget import minutes

EVERY = 55.0  # seconds after which a log file hears of a run that has said nothing


@dataclass
class _Stage:
    """A piece of work: since when it goes on, and how many rows and tokens of it are done."""

    what: str
    begun: float
    rows: int = 0  # 0 for work that is no pass over rows
    is_step: bool = False
    done: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Limits:
    """What a run is told of its time and money: seconds that are left, at most, and what has been spent, if known."""

    left: Callable[[], float] = lambda: math.inf
    spent: Callable[[], float | None] = lambda: None


class Progress:
    """The output of a run, as a context that ends its thread. `quiet` is every rank but the main one.

    A log file hears of the run after `every` seconds in which nothing else was said; `now` is the clock.
    """

    def __init__(self, quiet: bool, now: Callable[[], float] = time.perf_counter, every: float = EVERY):
        self.quiet, self._every = quiet, every
        self._now, self._limits = now, Limits()
        self._bar: tqdm[Any] | None = None
        self._lock = threading.Lock()  # of what is printed
        self._said = self._started = now()
        self._stage: _Stage | None = None
        self._total = self._step = self._first_step = self._batch_size = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        if not self.quiet and not _on_terminal():
            self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)  # unless it waits for a reader that is gone

    def log(self, *lines: str) -> None:
        """Print sentences, above the progress bar if there is one; a run is not lost where nothing can be printed."""
        for line in map(visible, lines):
            if self.quiet:
                continue
            with self._lock:
                self._said = self._now()
                try:
                    tqdm.write(line, file=sys.stdout) if self._bar is not None else print(line, flush=True)
                except (OSError, ValueError):  # a pipe that nobody reads any more, a full disk, a closed stream
                    self.quiet = True

    # ------------------------------------------------------------------------------------------------------- stages

    @contextlib.contextmanager
    def stage(self, what: str, rows: int = 0, is_step: bool = False) -> Iterator[None]:
        """Name the work within this context, over so many rows if it is a pass over rows."""
        before, self._stage = self._stage, _Stage(what, self._now(), rows, is_step)
        try:
            yield
        finally:
            self._stage = before

    def next_step(self) -> AbstractContextManager[None]:
        """Return a context that names the next optimizer step as the work within it; the bar moves with its rows."""
        return self.stage(f"step {self._step + 1}/{self._total}", self._batch_size, is_step=True)

    def advance(self, done: int, rows: int, tokens: int) -> None:
        """Note that so many of the rows of the present stage are done, and their tokens; by `Stepper`."""
        stage = self._stage
        if stage is None or not stage.rows:
            return
        stage.done, stage.rows, stage.tokens = done, rows, tokens
        if self._bar is not None and stage.is_step:
            self._bar.update(max(0, self._step * self._batch_size + done - self._bar.n))

    @contextlib.contextmanager
    def counting(self, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Give a function that takes how many more of `total` are done; a bar shows the count on a terminal."""
        shown = not self.quiet and _on_terminal()
        with (
            self.stage(f"reading {total:,} {unit}"),
            tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, disable=not shown, leave=False) as bar,
        ):

            def more(done: int) -> None:
                bar.update(done)

            yield more

    # -------------------------------------------------------------------------------------------------------- steps

    def start(self, total_steps: int, step: int, batch_size: int, limits: Limits | None = None) -> None:
        """Begin to count steps and time, from `step` of `total_steps`."""
        self._limits = limits or Limits()
        self._total, self._batch_size = total_steps, batch_size
        self._step = self._first_step = step
        self._started = self._now()
        if not self.quiet and _on_terminal():
            done, total = step * batch_size, total_steps * batch_size
            self._bar = tqdm(total=total, initial=done, unit=" rows", dynamic_ncols=True, smoothing=0.1)

    def step(self, step: int, total_steps: int, loss: float, tokens_per_second: float) -> None:
        """Move the bar to a finished step; loss, tokens/s and time left are shown in it."""
        self._step, self._total = step, total_steps
        if self._bar is not None:
            self._bar.total = total_steps * self._batch_size
            text = f"step {step}/{total_steps}, loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s{self._spent()}"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(max(0, step * self._batch_size - self._bar.n))

    def interval(self, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Print the figures of a logging interval where no bar shows them."""
        if self._bar is None:
            self.log(
                f"step {self._step}/{self._total}  loss {loss:.4f}  rate {learning_rate:.2e}  "
                f"{tokens_per_second:,.0f} tokens/s  {minutes(self._left(0.0))} left{self._spent()}"
            )

    def stop(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # --------------------------------------------------------------------------------------------- once in a minute

    def _watch(self) -> None:
        """Print where the run is whenever nothing has been said for a while; the thread's own function."""
        while not self._ended.wait(max(0.02 * self._every, self._said + self._every - self._now())):
            self.tick()

    def tick(self) -> None:
        """Print where the run is, if nothing has been said for a while."""
        stage = self._stage
        if stage is not None and self._bar is None and self._now() - self._said >= self._every:
            self.log(self._where(stage))

    def _where(self, stage: _Stage) -> str:
        seconds = self._now() - stage.begun
        if not stage.rows:
            return f"{stage.what}: {minutes(seconds)} so far"
        said = f"{stage.what}: {stage.done:,} of {stage.rows:,} rows"
        if not stage.done:
            return f"{said} in {minutes(seconds)}{self._spent()}"
        share = stage.done / stage.rows
        left = self._left(share) if stage.is_step else seconds / share * (1 - share)
        return f"{said}, {stage.tokens / max(seconds, 1e-9):,.0f} tokens/s, {minutes(left)} left{self._spent()}"

    def _left(self, share: float) -> float:
        """Return the seconds until the last step has ended, where this share of the next one is done."""
        done = self._step - self._first_step + share
        per_step = (self._now() - self._started) / max(done, 1e-9)
        return max(0.0, min(per_step * (self._total - self._step - share), self._limits.left()))

    def _spent(self) -> str:
        spent = self._limits.spent()
        return "" if spent is None else f", {spent:.2f} spent"


def _on_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
