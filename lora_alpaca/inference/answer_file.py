"""A file of answers on the disk: it grows by whole lines in the order of the rows, and is gone on with after a kill.

Beside `answers.jsonl` lies `answers.jsonl.run.json`, which says of what model, how and to which rows the answers are.
Only what is the same goes on. A file without it is somebody else's, and is never touched.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_alpaca.errors import FolderError
from lora_alpaca.storage import atomic
from lora_alpaca.storage.handles import sync_folder
from lora_alpaca.storage.json_files import read_json

KIND = "answers"
SUFFIXES = (".jsonl", ".ndjson")
FLUSHED_EVERY = 5.0  # seconds that a power cut can cost


class AnswerFile:
    """The file that answers go to. `path` is as the user named it. Raises FolderError for one that cannot be one."""

    def __init__(self, path: Path):
        self.path, self.real = path, Path(os.path.realpath(path))
        self.run_file = self.real.with_name(f"{self.real.name}.run.json")
        if path.suffix.lower() not in SUFFIXES:
            raise self.error(f"answers are lines of JSON; name a file that ends in {' or '.join(SUFFIXES)}")
        if os.path.lexists(self.real) and not self.real.is_file():
            raise self.error("not a plain file; name another one")
        if not self._is_ours() and (os.path.lexists(self.real) or os.path.lexists(self.run_file)):
            there = self.path if os.path.lexists(self.real) else self.run_file
            raise self.error(f"{there} is there already and no run of answers made it; name another file")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes away from the file within this context; the disk's errors become FolderError."""
        with self._disk_errors_named():
            try:
                with atomic.locked(self.real.with_name(f".{self.real.name}.lock")):
                    atomic.remove_hidden(self.real.parent, of=self.run_file.name)  # of a process that was killed
                    yield
            except BlockingIOError as error:
                raise self.error(
                    f"another process is writing it ({error}); wait for it, or name another file"
                ) from None

    def recorded(self) -> dict[str, Any]:
        """Return what is recorded of the answers that are there; empty where there are none to go on from."""
        return dict(read_json(self.run_file)["asked"]) if self._answered()[0] else {}

    def answered(self) -> int:
        """Return how many whole lines there are. Raises FolderError at one that is not the answer to its row."""
        return self._answered()[0]

    def begin(self, asked: Mapping[str, Any]) -> int:
        """Return how many rows are answered already, having dropped half a line at the end, or begun a new file."""
        done, size = self._answered()
        if not done:
            atomic.replace(self.run_file, atomic.as_json({"kind": KIND, "asked": asked}))
        with open(self.real, "ab") as file:  # one that is not there is made, and its name flushed
            if file.tell() != size:
                file.truncate(size)
            os.fsync(file.fileno())
        sync_folder(self.real.parent)
        return done

    @contextmanager
    def appending(self) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Give a function that adds a line."""
        flushed = time.monotonic()
        descriptor = os.open(self.real, os.O_WRONLY | os.O_APPEND)

        def append(line: Mapping[str, Any]) -> None:
            nonlocal flushed
            left = memoryview(json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n")
            while left:
                left = left[os.write(descriptor, left) :]
            if time.monotonic() - flushed > FLUSHED_EVERY:
                os.fsync(descriptor)
                flushed = time.monotonic()

        try:
            yield append
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def error(self, reason: str) -> FolderError:
        """Return the error that tells a reason."""
        return FolderError(f"--output_file {self.path}: {reason}")

    # ------------------------------------------------------------------------------------------------- inside

    def _is_ours(self) -> bool:
        run = read_json(self.run_file)
        return run.get("kind") == KIND and isinstance(run.get("asked"), dict)

    def _answered(self) -> tuple[int, int]:
        """Return how many whole lines there are, and their bytes.

        Raises FolderError at the first that is not the answer to its row.
        """
        number = size = 0
        if not os.path.lexists(self.real):
            return 0, 0
        with open(self.real, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                number, size = number + 1, size + len(line)
                if not _is_answer(line, number):
                    raise self.error(
                        f"line {number} is not the answer to row {number}, so it was changed; remove the file to begin "
                        "anew, or name another one"
                    )
        return number, size

    @contextmanager
    def _disk_errors_named(self) -> Iterator[None]:
        try:
            yield
        except FolderError:
            raise
        except OSError as error:
            raise self.error(f"it could not be written ({error.strerror or error}); the same command goes on") from None


def _is_answer(line: bytes, row: int) -> bool:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("row") == row
