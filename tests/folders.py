"""What tests of folders share: checkpoints as training writes them, and what a folder holds."""

import hashlib
import os
import signal
import time
from contextlib import contextmanager

import torch

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.artifacts.checkpoint import Checkpoint
from lora_alpaca.storage import atomic

SETTINGS = {"peft_type": "LORA", "r": 8}


def save(folder, step, run="ours", value=1.0):
    """Write a checkpoint of a run, the way that training does."""
    facts = {"step": step, "plan": {}, "progress": {}, "record": {}}
    tensors = {"a": torch.full((2, 3), value)}
    return checkpoints.save(folder, run, Checkpoint(facts, tensors, {"0.exp_avg": torch.zeros(2, 3)}), SETTINGS)


def damage(checkpoint):
    with open(checkpoint / checkpoints.OPTIMIZER, "r+b") as file:
        file.write(b"\1")


def contents(folder):
    """Return every file below a folder with its hash, and every empty folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@contextmanager
def another_process_holds(lock):
    """Let another process hold a lock file; the process can be killed by its number."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        with atomic.locked(lock):
            os.write(writer, b"in")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 2)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)
