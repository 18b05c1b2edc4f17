"""Which processes of a run are alive, how far each is, and which of them failed.

Every rank writes to a store that all of them reach: signs of life while it works, and its error when it ends with one.
A rank whose collective call fails reads there which rank to name. Without that, it would report its own "Connection
closed by peer", and the rank that failed would stay unknown.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from lora_alpaca.errors import RankError
from lora_alpaca.signals import Interrupted, Stop

INTERVAL = 0.5  # seconds between two signs of life
TIMEOUT = 3.0  # seconds without a sign of life after which a rank counts as dead
STOPPED = "stopped by "  # how the cause of a rank that a signal ended begins
ANOTHER = f"{STOPPED}the failure of rank "  # the cause of a rank that ended because another one failed


def _terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Heartbeat:
    """The health of the ranks of a run, as one of them sees it.

    `store` is a torch.distributed store. When another rank fails, `terminate` is called, which sends this process a
    SIGTERM, and the grace of `stop` is shortened: the step that is being computed cannot be finished.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        stop: Stop,
        store: Any,
        prefix: str,
        timeout: float = TIMEOUT,
        terminate: Callable[[], None] = _terminate_self,
    ):
        self.rank, self.others = rank, [other for other in range(world_size) if other != rank]
        self.calls = 0  # collective calls begun by this rank
        self._stop, self._store, self._prefix = stop, store, prefix
        self._timeout, self._terminate = timeout, terminate
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def guard(self, call: Callable[[], Any]) -> None:
        """Make a collective call. Raises RankError naming the rank for which it fails."""
        self.calls += 1
        try:
            call()
        except RuntimeError as error:  # of the backend of torch.distributed, whichever it is
            raise RankError(*self.failed_rank(str(error).splitlines()[0])) from None

    def verdict(self, error: BaseException | None) -> RankError | Interrupted | None:
        """Report the error that this rank ends with, and return the error to raise instead, if another rank caused it.

        Where one signal reached all ranks, none of them failed.
        """
        verdict: RankError | Interrupted | None = None
        if isinstance(error, RankError):
            self.report(f"{ANOTHER}{error.rank}")
            if self._stop and error.cause.startswith(STOPPED):
                verdict = Interrupted(self._stop.asked, error.saved)
        elif isinstance(error, Interrupted):
            self.report(f"{STOPPED}{error.signal}")
            if found := self.dead_rank():
                verdict = RankError(*found, str(error))
        elif isinstance(error, SystemExit):
            self.report(f"it left in the middle of the run, with exit code {error.code}")
        elif error is not None:
            self.report((str(error) or type(error).__name__).splitlines()[0])
        self.close()
        return verdict

    def report(self, cause: str) -> None:
        """Tell the other ranks what this rank ends with."""
        self._set("cause", cause)

    def close(self) -> None:
        """End the signs of life; a thread that is in the store while Python ends would abort the process."""
        self._closed.set()
        self._thread.join(timeout=self._timeout)

    def reported_failure(self) -> tuple[int, str] | None:
        """Return a rank that reported a failure, and its cause; a rank that a signal stopped did not fail."""
        return next((found for found in self._causes().items() if not found[1].startswith(STOPPED)), None)

    def dead_rank(self) -> tuple[int, str] | None:
        """Return a rank that failed or died, and the cause. It takes `timeout` seconds to know that none did."""
        deadline = time.monotonic() + self._timeout
        before = {rank: self._get(rank, "alive") for rank in self.others}
        while time.monotonic() < deadline:
            if found := self.reported_failure():
                return found
            if len(self._causes()) == len(self.others):  # signals stopped them all
                return None
            time.sleep(INTERVAL / 2)
        stopped = self._causes()
        silent = [rank for rank in self.others if rank not in stopped and self._get(rank, "alive") == before[rank]]
        return (silent[0], "it is gone without a word; was it killed, for its memory perhaps?") if silent else None

    def failed_rank(self, error: str) -> tuple[int, str]:
        """Return the rank for which a collective call failed with `error`, and the cause."""
        if found := self.dead_rank() or next(iter(self._causes().items()), None):
            return found
        calls = {rank: int(self._get(rank, "alive").split()[1]) for rank in self.others}
        slowest = min(calls, key=calls.__getitem__)
        hangs = calls[slowest] < self.calls or "timed out" in error.lower()  # FSDP2's own calls are not counted
        return slowest, "it hangs: the others waited for it as long as --rank_timeout says" if hangs else error

    def _causes(self) -> dict[int, str]:
        return {rank: cause for rank in self.others if (cause := self._get(rank, "cause"))}

    def _beat(self) -> None:
        number = 0
        while not self._closed.wait(INTERVAL):
            number += 1
            self._set("alive", f"{number} {self.calls}")
            if self.reported_failure() or any(cause.startswith(ANOTHER) for cause in self._causes().values()):
                self._stop.shorten_grace()
                self._terminate()
                return

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(f"{self._prefix}/{self.rank}/{key}", value)
        except RuntimeError:  # the process that holds the store has ended
            self._closed.set()

    def _get(self, rank: int, key: str) -> str:
        """Return what a rank wrote under a key; empty where it wrote nothing, or the store is closed."""
        name = f"{self._prefix}/{rank}/{key}"
        try:
            return self._store.get(name).decode() if self._store.check([name]) else ""
        except RuntimeError:
            return ""
