"""How the processes of a run meet: a store that all of them reach."""

import os
import time
from datetime import timedelta
from typing import Any

import torch

from lora_alpaca.errors import ConfigError, RankError

LATE = "it did not come: the others waited for it as long as --rank_timeout says"
_stores: list[Any] = []  # of this process: at most one
_runs = 0  # of this process: what is told in one is not for the next


def rendezvous(timeout: timedelta) -> dict[str, Any]:
    """Return what `init_process_group` takes, for one more run of the processes that a launcher has started together.

    Each run meets under a name of its own: with the names of the run before, gloo waits for connections of then. It
    returns when all are there, so that no rank waits inside torch, where signals are not heard, for one that has gone.
    Raises RankError naming a rank that does not come.
    """
    if (world_size := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        return {"timeout": timeout}
    rank, until = int(os.environ["RANK"]), time.monotonic() + timeout.total_seconds()
    global _runs
    _runs += 1
    store = torch.distributed.PrefixStore(run_prefix(), _launcher_store(until))  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    store.set(f"{rank} is here", "")
    for other in range(world_size):
        while not store.check([f"{other} is here"]):
            if time.monotonic() > until:
                raise RankError(other, LATE)
            time.sleep(0.01)
    return {"timeout": timeout, "store": store, "rank": rank, "world_size": world_size}


def _launcher_store(until: float) -> Any:
    """Return the store that all ranks reach, which is kept for the runs to come: torchrun's, or rank 0's own."""
    holds = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not _stores:
        try:
            _stores.append(connect(holds, timedelta(seconds=2)))  # a longer time-out would be deaf to signals
        except RuntimeError as error:
            if holds:
                raise ConfigError(f"the port of the variable MASTER_PORT cannot be opened: {error}") from None
            if time.monotonic() > until:
                raise RankError(0, LATE) from None
            time.sleep(0.1)
    return _stores[0]


def connect(holds: bool = False, timeout: timedelta = timedelta(seconds=30)) -> Any:
    """Return a connection to the store at the launcher's address, or with `holds` the store itself."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=holds, timeout=timeout, wait_for_workers=False, multi_tenant=holds
    )


def run_prefix() -> str:
    """Return what the keys of this run begin with: torchrun may have started the processes anew."""
    return f"lora_alpaca/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_runs}"
