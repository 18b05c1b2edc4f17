"""Signals: the first one ends the work at the next safe moment, the second one at once.

SIGINT (Ctrl-C), SIGTERM (a batch system, torchrun) and SIGHUP (a lost connection) mean the same. While a run trains,
the current step is finished and a checkpoint is written; everywhere else the work ends where it is.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

GRACE = 10.0  # seconds in which the current step may finish
LOST = 0.1  # the same, where it is lost in any case
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP
# torchrun relays the Ctrl-C that the terminal has sent to its workers already; the relayed one is no second signal
RELAY_WINDOW = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0  # seconds


class Interrupted(KeyboardInterrupt):
    """The signal named `signal` ended the work. The text says what is saved; the process exits with `exit_code`."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or "nothing was written")
        self.signal, self.exit_code = signal.Signals(number).name, 128 + number


class StepAbandoned(Exception):
    """The current step was given up before it changed anything."""


class Stop:
    """Whether a signal has asked this process to stop. `asked` is its number, or 0."""

    def __init__(
        self, grace: float = GRACE, relay_window: float = RELAY_WINDOW, exit: Callable[[int], Any] = os._exit
    ) -> None:
        self.asked, self._since = 0, 0.0
        self._grace, self._relay_window, self._exit = grace, relay_window, exit
        self._deferred = False
        self._interruptible = False

    def __bool__(self) -> bool:
        return bool(self.asked)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn signals into Interrupted within this context; only the main thread receives signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            self._set_alarm(0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal only set `asked` within this context, which the training loop checks between steps."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """End what takes longer than the grace after a signal, within this context, with StepAbandoned."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def lengthen_grace(self) -> None:
        """Let interruptible work take its time after a signal, unless `shorten_grace` is called."""
        if self._grace != LOST:
            self._grace = math.inf

    def shorten_grace(self) -> None:
        """Give up interruptible work at once at the next signal: its result is lost already."""
        self._grace = LOST

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._since > self._relay_window:
            self._exit(128 + number)  # at once: what is on the disk is always whole
        if self.asked:
            return
        self.asked, self._since = number, time.monotonic()
        if not self._deferred:
            raise Interrupted(number)
        if self._grace != math.inf:
            self._set_alarm(self._grace)

    def _set_alarm(self, seconds: float) -> None:
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self._on_alarm)
            signal.setitimer(signal.ITIMER_REAL, seconds, 0.1 if seconds else 0)
            if not seconds:  # after the timer: an alarm that nobody expects would end the process
                signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _on_alarm(self, *_: Any) -> None:
        if self._interruptible:
            self._interruptible = False
            raise StepAbandoned
