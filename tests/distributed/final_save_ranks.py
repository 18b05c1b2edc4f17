"""A rank of test_final_save.py: `finetune`, where the main rank's memory is limited once the training is over."""

import resource
import sys
from pathlib import Path
from typing import Any

from lora_alpaca.cli.verbs import main
from lora_alpaca.storage.hashing import WAITING
from lora_alpaca.training.checkpointing import FullCheckpoints

THREADS = 48 * 2**20  # the stacks of two threads, what they allocate, and the small files of the folder
BASE = next(Path(word.partition("=")[2]) for word in sys.argv if word.startswith("--base_model="))


def data_bytes() -> int:
    """Return what RLIMIT_DATA counts of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData")).split()[1]) * 1024


own = FullCheckpoints.finish


def finish(saver: FullCheckpoints, *more: Any) -> Any:
    """Save with as much memory more as two of the largest tensors, and what waits to be hashed.

    The files of the base are mapped, which takes no memory and counts all the same.
    """
    if not saver._world.is_main:
        return own(saver, *more)
    sizes = [tensor.nbytes for tensor in saver._weights().values()]
    mapped = sum(path.stat().st_size for path in BASE.glob("*.safetensors"))
    allowed = 2 * max(sizes) + WAITING + THREADS
    print(f"allowed: {allowed} {sum(sizes)}", flush=True)
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + allowed + mapped, limit[1]))
    try:
        return own(saver, *more)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limit)


FullCheckpoints.finish = finish  # type: ignore[method-assign]
main(["finetune", *sys.argv[1:]])
