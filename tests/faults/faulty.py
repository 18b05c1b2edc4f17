"""A run in which one rank fails: torchrun ... faulty.py FAULT RANK STEP --flag value ... (the flags of finetune).

The fault is put into the library's own functions, in this process alone, and happens while that rank takes that step,
counted from 1.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.cli.verbs import main
from lora_alpaca.errors import DataError

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from faults.library import GRADIENT, LOSS, ROWS, wrap


def raises() -> None:
    raise ValueError("the sky fell")


def exits() -> None:
    sys.exit(0)


def exits_at_once() -> None:
    os._exit(3)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def finds_a_bad_row() -> None:
    raise DataError("rows.json:7: Alpaca format: no output")


def lacks_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def hangs() -> None:
    time.sleep(3600)


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS: dict[str, Callable[[], None]] = {
    "raise": raises,
    "exit": exits,
    "_exit": exits_at_once,
    "kill": is_killed,
    "data": finds_a_bad_row,
    "memory": lacks_memory,
    "hang": hangs,
    "SIGSTOP": is_stopped,
}


def happens() -> None:
    print("the fault happens", file=sys.stderr, flush=True)


def put_in(fault: str, number: int) -> None:
    """Let this rank fail in its n-th step."""
    taken = 0

    def counted(gradient: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal taken
            taken += 1
            return gradient(*args)

        return call

    def faulty(loss: Any) -> Any:
        def call(engine: Any, batch: Any) -> Any:
            if taken == number and torch.is_grad_enabled():
                happens()
                if fault == "nan":
                    return loss(engine, batch) * float("nan")
                FAULTS[fault]()
            return loss(engine, batch)

        return call

    def other_rows(init: Any) -> Any:
        def call(rows: Any, *args: Any, **options: Any) -> None:
            happens()
            init(rows, *args, **options)
            rows.digest = "0" * 64

        return call

    def early(init: Any) -> Any:
        def call(*args: Any, **options: Any) -> None:
            happens()
            finds_a_bad_row()

        return call

    if fault == "early":  # before the ranks have met
        wrap(ROWS, early)
    elif fault == "rows":
        wrap(ROWS, other_rows)
    else:
        wrap(GRADIENT, counted)
        wrap(LOSS, faulty)


if __name__ == "__main__":
    fault, rank, number, *words = sys.argv[1:]
    if os.environ["RANK"] == rank:
        put_in(fault, int(number))
    main(["finetune", *words])
