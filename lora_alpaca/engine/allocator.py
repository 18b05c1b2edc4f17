"""Large buffers of a training step, kept for the next one instead of given back to the system.

glibc maps every buffer of more than 32 MB from the system and unmaps it when it is freed, so that each step pays for
touching all its pages anew: a third of the time of a plain training step on a CPU.
"""

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # the numbers of mallopt's parameters, in glibc's malloc.h
PAD_BYTES = 256 * 2**20


def keep_large_buffers() -> bool:
    """Tell the allocator of this process to keep what is freed; return whether there was one that understands."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, Windows, musl
        return False
    return all(mallopt(*setting) for setting in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, PAD_BYTES)))
