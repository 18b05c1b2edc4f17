"""Imports of large libraries without a search for garbage among their modules, which are none.

Python looks for garbage the more often the more objects are made, and every time through all of them. The libraries
below this one make a million, all of which stay: the searches take a third of the time of the imports.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Switch the garbage collector off within this context."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Count what is made within this context as old, which is seldom looked through. It is collected as all else is."""
    with gc_disabled():
        yield
        if not gc.get_freeze_count():  # a program that froze its own objects wants them to stay so
            gc.freeze()
            gc.unfreeze()  # to the oldest generation


def leave_garbage_at_exit() -> None:
    """Let the end of this process free its memory, which is faster than to search it for garbage once more."""
    atexit.register(gc.freeze)
