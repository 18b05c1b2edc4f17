"""Large buffers of a training step, kept for the next one instead of given back to the system.

glibc maps every buffer of more than 32 MB from the system and unmaps it when it is freed, so that each step pays for
touching all its pages anew: a third of the time of a plain training step on a CPU.
"""

import ctypes

# the numbers of mallopt's parameters, in glibc's malloc.h
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4
PAD_BYTES = 256 * 2**20
MAPPED_BYTES, MAPS = 2**20, 65_536  # from this size on, and at most so many


def keep_large_buffers() -> bool:
    """Tell the allocator of this process to keep what is freed; return whether there was one that understands."""
    return _set((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, PAD_BYTES))


def return_large_buffers() -> bool:
    """Tell the allocator to give back what is freed at once; return whether there was one that understands.

    Sharded weights that are gathered and let go, layer by layer, would otherwise add up to several times the model.
    """
    return _set((MMAP_MAX, MAPS), (MMAP_THRESHOLD, MAPPED_BYTES))


def _set(*settings: tuple[int, int]) -> bool:
    """Set parameters of the allocator; return whether it took them."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, Windows, musl
        return False
    return all(mallopt(*setting) for setting in settings)
