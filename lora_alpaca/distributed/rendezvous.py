"""How the processes of a run meet: at a store that all of them reach, under a name of this run's own."""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from lora_alpaca.distributed.agreement import Facts, require_same
from lora_alpaca.errors import ConfigError, RankError

ABSENT = "it did not come: the others waited for it as long as --rank_timeout says"
SAME = "every rank needs the same"
_stores: list[Any] = []  # of this process: at most one
_runs = 0  # of this process: the keys of one run are not those of the next


def rendezvous(timeout: timedelta, facts: Callable[[], Facts]) -> dict[str, Any]:
    """Wait for every process of a run, and return the arguments of `init_process_group`.

    One launch may train several runs. Each meets under a name of its own: under the names of the run before, gloo waits
    for connections that are closed. The waiting is done here, since torch ignores signals while it waits. Raises
    RankError naming a rank that does not come, and ConfigError naming one whose `facts`, which a process alone
    is not asked for, are not those of the others: before they connect, since processes of two kinds of device would
    wait for each other.
    """
    global _runs
    if (world_size := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        return {"timeout": timeout}
    rank, deadline = int(os.environ["RANK"]), time.monotonic() + timeout.total_seconds()
    _runs += 1
    store = torch.distributed.PrefixStore(run_prefix(), _launcher_store(deadline))  # type: ignore[attr-defined]
    store.set_timeout(timeout)
    store.set(f"{rank} is here", json.dumps(facts()))
    ranks: list[Facts] = []
    for other in range(world_size):
        while not store.check([f"{other} is here"]):
            if time.monotonic() > deadline:
                raise RankError(other, ABSENT)
            time.sleep(0.01)
        ranks.append(json.loads(store.get(f"{other} is here") or "{}"))
    require_same(ranks, SAME)
    return {"timeout": timeout, "store": store, "rank": rank, "world_size": world_size}


def run_prefix() -> str:
    """Return the prefix of this run's keys; torchrun may have restarted the processes."""
    return f"lora_alpaca/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_runs}"


def connect(is_server: bool = False, timeout: timedelta = timedelta(seconds=30)) -> Any:
    """Return a connection to the store at the launcher's address, or with `is_server` the store itself."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=is_server, timeout=timeout, wait_for_workers=False, multi_tenant=is_server
    )


def _launcher_store(deadline: float) -> Any:
    """Return the store that all ranks reach, kept for later runs: torchrun's, or rank 0's own."""
    is_server = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not _stores:
        try:
            _stores.append(connect(is_server, timedelta(seconds=2)))  # signals are not handled while torch connects
        except RuntimeError as error:
            if is_server:
                raise ConfigError(f"the port of the variable MASTER_PORT cannot be opened: {error}") from None
            if time.monotonic() > deadline:
                raise RankError(0, ABSENT) from None
            time.sleep(0.1)
    return _stores[0]
