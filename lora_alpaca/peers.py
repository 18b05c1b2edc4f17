"""The other processes of a run: which of them is alive, how far it is, and what it died of.

Every rank tells a store that all of them reach that it lives, and, when it ends with an error, why. A rank whose
collective call fails asks there whom to name; without that, the innocent would report "Connection closed by peer".
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from lora_alpaca.errors import ConfigError, RankError

BEAT = 0.5  # seconds between two signs of life
SILENT = 3.0  # seconds without one after which a rank is taken for dead
STOPPED = "stopped by "  # how the cause of a rank that a signal ended begins
ANOTHER = f"{STOPPED}the failure of rank "  # of a rank that another one ended
LATE = "it did not come: the others waited for it as long as --rank_timeout says"
_stores: list[Any] = []  # of this process: at most one


def group_of_this_run(timeout: timedelta) -> dict[str, Any]:
    """Return what `init_process_group` takes, for one more run of the processes that a launcher has started together.

    Each run meets under a name of its own: with the names of the run before, gloo waits for connections of then. It
    returns when all are there, so that no rank waits inside torch, where signals are not heard, for one that has gone.
    Raises RankError naming a rank that does not come.
    """
    if (world_size := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        return {"timeout": timeout}
    rank, until = int(os.environ["RANK"]), time.monotonic() + timeout.total_seconds()
    Peers.runs += 1
    store = torch.distributed.PrefixStore(_run(), _launchers_store(until))  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    store.set(f"{rank} is here", "")
    for other in range(world_size):
        while not store.check([f"{other} is here"]):
            if time.monotonic() > until:
                raise RankError(other, LATE)
            time.sleep(0.01)
    return {"timeout": timeout, "store": store, "rank": rank, "world_size": world_size}


def _launchers_store(until: float) -> Any:
    """Return the store that all ranks reach, which is kept for the runs to come: torchrun's, or rank 0's own."""
    holds = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not _stores:
        try:
            _stores.append(connected(holds, timedelta(seconds=2)))  # a longer time-out would be deaf to signals
        except RuntimeError as error:
            if holds:
                raise ConfigError(f"the port of the variable MASTER_PORT cannot be opened: {error}") from None
            if time.monotonic() > until:
                raise RankError(0, LATE) from None
            time.sleep(0.1)
    return _stores[0]


def connected(holds: bool = False, timeout: timedelta = timedelta(seconds=30)) -> Any:
    """Return a connection to the store at the launcher's address, or with `holds` the store itself."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=holds, timeout=timeout, wait_for_workers=False, multi_tenant=holds
    )


def _run() -> str:
    """Return what the keys of this run begin with: torchrun may have started the processes anew."""
    return f"lora_alpaca/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{Peers.runs}"


class Peers:
    """The ranks of a run as this one sees them. `calls` counts the collective calls that it has begun.

    When one of them fails, `in_vain` is called and this process gets a SIGTERM.
    """

    runs = 0  # of this process: what is told in one is not for the next

    def __init__(self, rank: int, world_size: int, in_vain: Callable[[], None] = lambda: None):
        self.rank, self.others = rank, [other for other in range(world_size) if other != rank]
        self.calls, self._in_vain = 0, in_vain
        self._run, self._store = _run(), connected()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="signs of life")
        self._thread.start()

    def say(self, cause: str) -> None:
        """Tell the others what this rank ends with."""
        self._set("cause", cause)

    def close(self) -> None:
        """End the signs of life."""
        self._over.set()
        self._thread.join(timeout=2 * BEAT)

    def failed(self) -> tuple[int, str] | None:
        """Return a rank that has said that it failed, and its cause; None where none has, or signals stopped them."""
        return next((found for found in self._causes().items() if not found[1].startswith(STOPPED)), None)

    def gone(self) -> tuple[int, str] | None:
        """Return a rank that has failed or died, and the cause; it takes some seconds to be sure that none has."""
        until = time.monotonic() + SILENT
        before = {rank: self._get(rank, "alive") for rank in self.others}
        while time.monotonic() < until:
            if found := self.failed():
                return found
            if len(self._causes()) == len(self.others):  # signals have stopped them all
                return None
            time.sleep(BEAT / 2)
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
        while not self._over.wait(BEAT):
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
