"""The other processes of a run: which of them is alive, how far it is, and what it died of.

Every rank tells a store that all of them reach that it lives, and, when it ends with an error, why. A rank whose
collective call fails asks there whom to name; without that, the innocent would report "Connection closed by peer".
"""

import os
import signal
import threading
import time
from collections.abc import Callable

from lora_alpaca.distributed.rendezvous import connect, run_prefix

INTERVAL = 0.5  # seconds between two signs of life
TIMEOUT = 3.0  # seconds without one after which a rank is taken for dead
STOPPED = "stopped by "  # how the cause of a rank that a signal ended begins
ANOTHER = f"{STOPPED}the failure of rank "  # of a rank that another one ended


class Heartbeat:
    """The ranks of a run as this one sees them. `calls` counts the collective calls that it has begun.

    When one of them fails, `in_vain` is called and this process gets a SIGTERM.
    """

    def __init__(self, rank: int, world_size: int, in_vain: Callable[[], None] = lambda: None):
        self.rank, self.others = rank, [other for other in range(world_size) if other != rank]
        self.calls, self._in_vain = 0, in_vain
        self._run, self._store = run_prefix(), connect()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="signs of life")
        self._thread.start()

    def say(self, cause: str) -> None:
        """Tell the others what this rank ends with."""
        self._set("cause", cause)

    def close(self) -> None:
        """End the signs of life."""
        self._over.set()
        self._thread.join(timeout=2 * INTERVAL)

    def failed(self) -> tuple[int, str] | None:
        """Return a rank that has said that it failed, and its cause; None where none has, or signals stopped them."""
        return next((found for found in self._causes().items() if not found[1].startswith(STOPPED)), None)

    def gone(self) -> tuple[int, str] | None:
        """Return a rank that has failed or died, and the cause; it takes some seconds to be sure that none has."""
        until = time.monotonic() + TIMEOUT
        before = {rank: self._get(rank, "alive") for rank in self.others}
        while time.monotonic() < until:
            if found := self.failed():
                return found
            if len(self._causes()) == len(self.others):  # signals have stopped them all
                return None
            time.sleep(INTERVAL / 2)
        stopped = self._causes()
        silent = [rank for rank in self.others if rank not in stopped and self._get(rank, "alive") == before[rank]]
        return (silent[0], "it is gone without a word; was it killed, for its memory perhaps?") if silent else None

    def blame(self, error: str) -> tuple[int, str]:
        """Return the rank for which a collective call failed with `error`, and the cause."""
        if found := self.gone() or next(iter(self._causes().items()), None):
            return found
        behind = {rank: int(self._get(rank, "alive").split()[1]) for rank in self.others}
        slowest = min(behind, key=behind.__getitem__)
        hangs = behind[slowest] < self.calls
        return slowest, "it hangs: the others waited for it as long as --rank_timeout says" if hangs else error

    def _causes(self) -> dict[int, str]:
        return {rank: cause for rank in self.others if (cause := self._get(rank, "cause"))}

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(INTERVAL):
            number += 1
            self._set("alive", f"{number} {self.calls}")
            if self.failed() or any(cause.startswith(ANOTHER) for cause in self._causes().values()):
                self._in_vain()
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(f"{self._run}/{self.rank}/{key}", value)
        except RuntimeError:  # the process that holds the store is gone
            self._over.set()

    def _get(self, rank: int, key: str) -> str:
        """Return what a rank has told; nothing if it has told nothing, or the store is gone."""
        name = f"{self._run}/{rank}/{key}"
        try:
            return self._store.get(name).decode() if self._store.check([name]) else ""
        except RuntimeError:
            return ""
