"""Hashes that are computed by a thread beside the work: sha256 does not need Python's lock."""

import hashlib
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

WAITING = 16 * 2**20  # bytes that may wait to be hashed, and are held meanwhile


class Hashing:
    """The sha256 of several byte strings by name, each of which may come in parts."""

    def __init__(self) -> None:
        self._hashes: defaultdict[str, Any] = defaultdict(hashlib.sha256)
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0

    def add(self, name: str, data: memoryview) -> None:
        """Hash the next part of a name. Waits where too much waits already."""
        self._waiting.append((data.nbytes, self._thread.submit(self._hashes[name].update, data)))
        self._bytes += data.nbytes
        while self._bytes > WAITING and len(self._waiting) > 1:
            self._wait()

    def finish(self) -> dict[str, str]:
        """Return name -> sha256, in hex, of all that was added."""
        while self._waiting:
            self._wait()
        self._thread.shutdown()
        return {name: found.hexdigest() for name, found in self._hashes.items()}

    def _wait(self) -> None:
        size, job = self._waiting.popleft()
        job.result()
        self._bytes -= size
