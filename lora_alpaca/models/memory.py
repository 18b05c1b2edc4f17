"""A base model without its weights: what can be known about it before the first heavy step."""

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
    """There was not enough memory; the text says how much was asked for, if that is known."""


def shortage(error: Exception) -> str:
    """Return the first sentence of an error that is a want of memory; any other is raised again."""
    text = str(error)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(sign in text.lower() for sign in SIGNS):
        raise error
    return next((line.strip()[:160] for line in text.splitlines() if line.strip()), "no more is given")


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Return how many bytes of a device's memory are free, in all processes, and how many there are.

    On a CPU both are without swap, and within the limit of the container or batch job that this process runs in.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    groups = list(_groups())
    free = min([memory.available, *(limit - used for limit, used in groups)])
    return free, min([memory.total, *(limit for limit, _ in groups)])


def _groups() -> Iterator[tuple[int, int]]:
    """Yield limit and use of the control groups around this process, in bytes; cached files are no use."""
    try:
        lines = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:  # another system
        return
    for _, controllers, name in lines:
        if controllers == "":
            top, limit_file, used_file, cached_key = GROUPS, "memory.max", "memory.current", "inactive_file"
        elif controllers == "memory":  # the first version of control groups
            top, cached_key = GROUPS / "memory", "total_inactive_file"
            limit_file, used_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = top / name.lstrip("/")
        for group in (inner, *(above for above in inner.parents if above.is_relative_to(top))):
            try:  # in a container the inner ones may be out of sight
                limit, used = (group / limit_file).read_text(), int((group / used_file).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit.strip().isdigit():  # "max" is none
                yield int(limit), max(0, used - int(stat.get(cached_key, 0)))


def describe_free(device: torch.device) -> str:
    """Return in words how much memory of a device is free."""
    free, whole = free_and_total(device)
    return f"{free / 1e9:.1f} of {whole / 1e9:.1f} GB are free"


def release(device: torch.device) -> None:
    """Give back what is cached, to try again with less."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
