"""A time limit for code of strangers in this process: a chat template is a program, and may loop for hours.

One thread watches all others, so that a limit costs next to nothing where it is kept.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_INTERVAL = 0.2  # seconds between two looks at the clock
_lock = threading.Lock()
_deadlines: dict[int, float] = {}  # thread -> when its time is up
_watchers: list[threading.Thread] = []


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in this thread, within this context, once that many seconds have passed.

    It is raised between two steps of Python: a single call of a C function is not interrupted.
    """
    thread = threading.get_ident()
    with _lock:
        _deadlines[thread] = time.monotonic() + seconds
        if not _watchers or not _watchers[0].is_alive():  # nor does it live on in a process that was forked
            _watchers[:] = [threading.Thread(target=_watch, name="time limit", daemon=True)]
            _watchers[0].start()
    try:
        yield
    finally:
        with _lock:
            if _deadlines.pop(thread, None) is None:  # raised, and perhaps not here yet
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)


def _watch() -> None:
    while True:
        time.sleep(_INTERVAL)
        with _lock:
            now = time.monotonic()
            for thread in [thread for thread, deadline in _deadlines.items() if deadline < now]:
                del _deadlines[thread]
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeoutError))
            if not _deadlines:
                _watchers.clear()
                return
