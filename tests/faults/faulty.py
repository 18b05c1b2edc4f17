"""A run in which one rank fails: torchrun ... faulty.py FAULT RANK STEP --flag value ... (the flags of finetune).

The fault is put into the library's own functions, in this process alone, and happens while that rank takes that step,
counted from 1.
"""

import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from lora_alpaca import data
from lora_alpaca.cli.verbs import main
from lora_alpaca.engine import Engine
from lora_alpaca.errors import DataError
from lora_alpaca.training.step import Stepper


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
    taken, gradient, loss = 0, Stepper._gradient, Engine.loss

    def counted(learner, *args):
        nonlocal taken
        taken += 1
        return gradient(learner, *args)

    def faulty(engine, batch):
        if taken == number and torch.is_grad_enabled():
            if fault == "nan":
                happens()
                return loss(engine, batch) * float("nan")
            happens()
            FAULTS[fault]()
        return loss(engine, batch)

    def other_rows(rows, *args, **options):
        happens()
        init(rows, *args, **options)
        rows.digest = "0" * 64

    def early(*args, **options):
        happens()
        finds_a_bad_row()

    if fault == "early":  # before the ranks have met
        data.Rows.__init__ = early
    elif fault == "rows":
        init, data.Rows.__init__ = data.Rows.__init__, other_rows
    else:
        Stepper._gradient = counted
        Engine.loss = faulty


if __name__ == "__main__":
    fault, rank, number, *words = sys.argv[1:]
    if os.environ["RANK"] == rank:
        put_in(fault, int(number))
    main(["finetune", *words])
