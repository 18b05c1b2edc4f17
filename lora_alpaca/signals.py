"""Signals: the first one ends the work at the next good moment, the second one at once.

SIGINT (Ctrl-C), SIGTERM (a batch system, torchrun) and SIGHUP (a lost connection) mean the same. While a run trains,
the step under way is finished and a checkpoint written; everywhere else there is nothing to finish.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

GRACE = 10.0  # seconds in which the step under way may end by itself
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)  # Windows has no SIGHUP
# torchrun passes on the Ctrl-C that the terminal has sent to its workers already; that is not a second one
RELAY_WINDOW = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0  # seconds


class Interrupted(KeyboardInterrupt):
    """The signal named `signal` ended the work. The text says what is saved; the process exits with `exit_code`."""

    def __init__(self, number: int, said: str = ""):
        super().__init__(said or "nothing was written")
        self.signal, self.exit_code = signal.Signals(number).name, 128 + number


class StepAbandoned(Exception):
    """The step under way was given up; nothing had been moved by it."""


class Stop:
    """Whether a signal has asked this process to stop. `asked` is its number, or 0."""

    def __init__(self) -> None:
        self.asked, self._since = 0, 0.0
        self._patient = False
        self._may_abandon = False
        self._grace: float | None = None  # GRACE, unless told otherwise

    def __bool__(self) -> bool:
        return bool(self.asked)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn signals into Interrupted within this context; of a thread that is not the main one, no signals come."""
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
    def patient(self) -> Iterator[None]:
        """Within this context a signal only sets `asked`: the one who works here looks at it."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    @contextmanager
    def may_abandon(self) -> Iterator[None]:
        """Within this context, what takes longer than GRACE after a signal is ended with StepAbandoned."""
        self._may_abandon = True
        try:
            yield
        finally:
            self._may_abandon = False

    def hurry(self) -> None:
        """Let the next signal give up at once what may be abandoned: it is in vain."""
        self._grace = 0.1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self._since > RELAY_WINDOW:  # at once: what is on the disk is always whole
            os._exit(128 + number)
        if self.asked:
            return
        self.asked, self._since = number, time.monotonic()
        if not self._patient:
            raise Interrupted(number)
        self._set_alarm(GRACE if self._grace is None else self._grace)

    def _set_alarm(self, seconds: float) -> None:
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self._on_alarm)
            signal.setitimer(signal.ITIMER_REAL, seconds, 0.1 if seconds else 0)
            if not seconds:  # after the timer: an alarm that nobody expects would end the process
                signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _on_alarm(self, *_: Any) -> None:
        if self._may_abandon:
            self._may_abandon = False
            raise StepAbandoned
