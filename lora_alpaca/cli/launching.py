"""One command that starts several processes, one for each device, as torchrun does and through the same code."""

import logging
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.environment import is_launched

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def cards() -> int:
    """Return how many CUDA devices this machine has, without taking hold of one."""
    import torch

    return torch.cuda.device_count()


def processes(config: FinetuneConfig, cards: Callable[[], int] = cards) -> int:
    """Return how many processes a command starts; 1 where it does the work itself.

    As many as --processes says. Unless it does, sharded weights are for all cards of the machine.
    """
    if is_launched():
        return 1
    if config.processes is not None:
        return config.processes
    is_sharded = config.shard in ("grads", "full")
    return max(1, cards()) if is_sharded and config.device in ("auto", "cuda") else 1


def launch(words: Sequence[str], config: FinetuneConfig, number: int) -> int:
    """Run the command in so many processes and return its exit code: that of the process that failed first.

    A signal is passed on to all of them, which save and end; a second one ends them at once. Raises ConfigError where
    the rows of a step cannot be shared out among so many.
    """
    config.micro_batch(number)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in list(logging.root.manager.loggerDict):  # the processes say themselves, in a line, how they end
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    package = str(Path(__file__).parents[2])  # which need not be installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    told = {
        "nproc_per_node": number,
        "shutdown_timeout": config.rank_timeout,  # seconds; a checkpoint of a large model takes its time
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",  # any port that is free
        "rdzv_id": uuid.uuid4(),
    }
    options = [f"--{name}={value}" for name, value in told.items()]
    launching, program, arguments = run.config_from_args(run.parse_args([*options, "-m", "lora_alpaca", *words]))
    sys.stdout.flush()
    try:
        elastic_launch(launching, program)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:  # it has said itself how it ended
            return failure.exitcode
        print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as stop:
        return 128 + stop.sigval
    finally:
        if launching.logs_specs is not None:
            with suppress(OSError):
                shutil.rmtree(launching.logs_specs.root_log_dir)
    return 0


def end_with_launcher() -> None:
    """Let a process that a launcher started be stopped when that launcher dies, so that none is left behind (Linux)."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    import ctypes

    with suppress(OSError, AttributeError):  # of another C library
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
