"""Standard input and outputs of any kind: closed, full, read by nobody, or in an encoding that lacks a letter."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

NAMES = ("stdin", "stdout", "stderr")
BROKEN_PIPE = 141  # the exit code of a command whose reader has left, as if SIGPIPE had ended it


class OutputError(Exception):
    """Standard output, which is the product of this command, takes no more; `error` says why."""

    def __init__(self, error: OSError):
        super().__init__(f"standard output: {error.strerror or error}")
        self.exit_code = BROKEN_PIPE if isinstance(error, BrokenPipeError) else 1


@contextmanager
def usable_streams(goes_on: bool) -> Iterator[None]:
    """Let nothing that is printed within this context end the work with a traceback.

    A letter that the encoding lacks is written as its number. Where the work `goes_on`, for its product is a folder,
    what standard output does not take is told once on stderr; otherwise OutputError is raised. What stderr does not
    take is lost.
    """
    _open_missing()
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _Output(sys.stdout, _warn if goes_on else _refuse), _Output(sys.stderr, _ignore)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def _warn(error: OSError) -> None:
    print(f"warning: standard output takes no more ({error.strerror or error}); the work goes on", file=sys.stderr)


def _refuse(error: OSError) -> None:
    raise OutputError(error)


def _ignore(error: OSError) -> None:
    pass


def _discard(stream: Any) -> None:
    """Let what a stream still holds, and what is written to it from now on, go nowhere."""
    with suppress(OSError, ValueError, AttributeError):  # of a stream that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _open_missing() -> None:
    """Open what was closed when the process began: a file opened later would be taken for a standard stream."""
    for number, name in enumerate(NAMES):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115  it stays


class _Output:
    """An output that leads nowhere from when its stream fails, which `tell` is called for."""

    def __init__(self, stream: Any, tell: Callable[[OSError], None]):
        self._stream, self._tell, self._lost = stream, tell, False

    def write(self, text: str) -> int:
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, action: Callable[..., Any], *values: str) -> None:
        if not self._lost:
            try:
                action(*values)
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self._lost = True
        _discard(self._stream)
        self._tell(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
