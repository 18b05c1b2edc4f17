"""Large buffers of a training step, kept for the next one instead of given back to the system.

glibc maps every buffer of more than 32 MB from the system and unmaps it when it is freed, so that each step pays for
touching all its pages anew: a third of the time of a plain training step on a CPU.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# the numbers of mallopt's parameters, in glibc's malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
PAD_BYTES = 256 * 2**20
MAPPED_BYTES, MAPS = 2**20, 65_536  # from this size on, and at most so many
KERNEL_CACHES, KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 64  # of oneDNN, and before it


def keep_large_buffers() -> bool:
    """Tell the allocator of this process to keep what is freed; return whether there was one that understands."""
    return _set((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, PAD_BYTES))


def return_large_buffers() -> bool:
    """Tell the allocator to give back what is freed at once; return whether there was one that understands.

    Sharded weights that are gathered and let go, layer by layer, would otherwise add up to several times the model.
    """
    return _set((MMAP_MAX, MAPS), (MMAP_THRESHOLD, MAPPED_BYTES))


@contextmanager
def returning_large_buffers() -> Iterator[None]:
    """Within this context, give back at once what is freed, what is free already too, and keep it again afterwards.

    Token by token a generation makes buffers that fit into no gap of a heap that is kept: a buffer more for each token.
    What a step has left free there would lie beside all of them.
    """
    return_large_buffers()
    trim()
    try:
        yield
    finally:
        trim()
        keep_large_buffers()


def bound_kernel_caches() -> None:
    """Let few compiled products be kept on a CPU, unless the user says how many: the library reads it at its first one.

    It compiles a product in 16 bits for every shape and keeps 1024 of them, which are a gigabyte where lengths differ.
    Packs have few lengths, with which keeping more makes no step faster.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS))


def trim() -> None:
    """Give back to the system what is free in the heap, wherever that is: once, after work that needed more."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _set(*settings: tuple[int, int]) -> bool:
    """Set parameters of the allocator; return whether it took them."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, Windows, musl
        return False
    return all(mallopt(*setting) for setting in settings)
