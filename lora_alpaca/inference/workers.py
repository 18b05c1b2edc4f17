"""The threads that make answers, and the order in which they may use the model."""

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable

LONGEST_TOKEN = 30.0  # seconds that the end of the process waits for the token that is being made

leaving = threading.Event()  # this process ends
_WORKERS: "weakref.WeakKeyDictionary[threading.Thread, Callable[[], None]]" = weakref.WeakKeyDictionary()


def start(work: Callable[[], None], wake: Callable[[], None] = lambda: None) -> threading.Thread:
    """Start a thread that does some work, stops within a token once `leaving` is set, and waits only for `wake`."""
    worker = threading.Thread(target=work, name="answers", daemon=True)
    _WORKERS[worker] = wake
    worker.start()
    return worker


@atexit.register
def _stop_all() -> None:
    """Let every worker end at its next token: one that Python leaves behind inside of torch aborts the process."""
    leaving.set()
    workers = list(_WORKERS.items())
    for _, wake in workers:
        wake()
    for worker, _ in workers:
        if worker.is_alive():  # one that is only about to start finds that this process ends
            worker.join(LONGEST_TOKEN)


class Turns:
    """A lock on the model that goes to who has waited longest, which a plain lock does not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> "Turns":
        with self._lock:
            if not self._taken:
                self._taken = True
                return self
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()  # released by who hands over
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False

    @property
    def wanted(self) -> bool:
        """Return whether another thread waits for its turn."""
        return bool(self._waiting)

    def offer(self) -> None:
        """Let the others that wait have a turn each, and come back. Called by who has the turn."""
        if self._waiting:
            self.__exit__()
            self.__enter__()
