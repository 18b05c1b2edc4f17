"""The most memory that this process held for a while, and the most that its tensors took of that."""

import ctypes
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lora_alpaca.models import memory

SAMPLED = 0.003  # seconds between two looks
STATUS = Path("/proc/self/status")


class _Heap(ctypes.Structure):
    """What glibc tells of its heap since 2.33: `struct mallinfo2` of malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


@cache
def _heap() -> Callable[[], Any] | None:
    try:
        found = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):  # an older glibc, or another library
        return None
    found.restype = _Heap
    return found


def held(device: torch.device) -> int:
    """Return the bytes that this process holds of a device; of a CPU, without files that are mapped (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    except OSError:  # not Linux
        pass
    return memory.in_use(device)


def live(device: torch.device) -> int:
    """Return the bytes that are in use of those that this process holds of a device: of a heap, without its gaps."""
    heap = _heap() if device.type == "cpu" else None
    if heap is None:
        return held(device)
    found = heap()
    return int(found.uordblks + found.hblkhd)


class Peak:
    """A context; `bytes` is the most that this process held within it, `live` the most of it that was in use.

    Looking takes `seconds` of the processor: of a large heap a look takes milliseconds, so `live` may be left out.
    """

    def __init__(self, device: torch.device, in_use: bool = True):
        self._device, self._in_use, self._done = device, in_use, threading.Event()
        self._sampler = threading.Thread(target=self._watch, daemon=True)
        self.bytes = self.live = 0
        self.seconds = 0.0

    def __enter__(self) -> "Peak":
        self._look()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = self.live = torch.cuda.max_memory_allocated(self._device)
            return
        self._done.set()
        self._sampler.join()
        self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, held(self._device))
        if self._in_use:
            self.live = max(self.live, live(self._device))

    def _watch(self) -> None:
        while not self._done.wait(SAMPLED):
            self._look()
            self.seconds = time.thread_time()
