"""Memory: is an error a want of it, how much is left, and how to give back what a failed attempt holds."""

import gc

import psutil
import torch

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


class MemoryShortage(Exception):
    """There was not enough memory; the text says how much was asked for, if that is known."""


def shortage(error: Exception) -> str:
    """Return the first sentence of an error that is a want of memory; any other is raised again."""
    text = str(error)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(sign in text.lower() for sign in SIGNS):
        raise error
    return next((line.strip()[:160] for line in text.splitlines() if line.strip()), "no more is given")


def free(device: torch.device) -> str:
    """Return in words how much memory of a device is free, in all processes."""
    if device.type == "cuda":
        left, whole = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        left, whole = memory.available, memory.total
    return f"{left / 1e9:.1f} of {whole / 1e9:.1f} GB are free"


def release(device: torch.device) -> None:
    """Give back what is cached, to try again with less."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
