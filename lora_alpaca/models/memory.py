"""Memory: how much a device has left, what an error says about a shortage, and how to free what is cached."""

import gc
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def gigabytes(size: int) -> str:
    """Return a number of bytes in GB, for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e9:.3f} GB"


GROUPS = Path("/sys/fs/cgroup")  # https://docs.kernel.org/admin-guide/cgroup-v2.html
OWN_GROUPS = Path("/proc/self/cgroup")

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class MemoryShortage(Exception):
    """There was not enough memory; the text says how much was asked for, where that is known."""


def shortage(error: Exception) -> str:
    """Return the first line of an error that says that memory is short. Raises any other error again."""
    text = str(error)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(sign in text.lower() for sign in SIGNS):
        raise error
    return next((line.strip()[:160] for line in text.splitlines() if line.strip()), "no more is given")


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Return the free bytes and all bytes of a device's memory, whichever process uses the rest.

    On a CPU neither counts swap, and both are within the limit of the container or batch job of this process.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    groups = list(_groups())
    free = min([memory.available, *(limit - used for limit, used in groups)])
    return free, min([memory.total, *(limit for limit, _ in groups)])


def free_of_host() -> int:
    """Return the free bytes of the memory of this machine, swap included."""
    return free_and_total(torch.device("cpu"))[0] + psutil.swap_memory().free


def _groups() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of the control groups around this process that have a limit.

    Use is without cached files, which the kernel drops where memory is short.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for inner in (GROUPS / line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")):
        for group in (inner, *(above for above in inner.parents if above.is_relative_to(GROUPS))):
            try:  # in a container the inner groups may be out of sight
                limit, used = (group / "memory.max").read_text(), int((group / "memory.current").read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit.strip().isdigit():  # otherwise it is "max"
                yield int(limit), max(0, used - int(stat.get("inactive_file", 0)))


def describe_free(device: torch.device) -> str:
    """Return in words how much memory of a device is free."""
    free, whole = free_and_total(device)
    return f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"


def in_use(device: torch.device) -> int:
    """Return the most bytes that this process has had on a CUDA device; elsewhere those that it has now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def release(device: torch.device) -> None:
    """Free what is cached, before a second attempt with less."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
