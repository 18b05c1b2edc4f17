"""What a run is doing, as its process notes it in a file: a line with phase, finished steps and time for each phase.

The functions of the library that begin a phase are wrapped in that process alone, and write one line. Nothing that is
printed is read. Under torchrun the first rank writes.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

from . import library

TRACE = "LORA_ALPACA_TESTS_TRACE"  # the variable that names the file to processes from the command line
PHASES = ("load", "train", "validate", "save", "rotate", "final save")


@dataclass(frozen=True)
class Entry:
    """The beginning of a phase after so many finished steps; `stepped` and `end` are the ends of `train` and all."""

    phase: str
    step: int
    time: float  # of the machine's clock, which all processes share


def read(trace: Path) -> list[Entry]:
    """Return what a process has noted so far."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [Entry(phase, int(step), float(at)) for phase, step, at in (line.split("\t") for line in lines)]


def last_phase(entries: list[Entry]) -> str:
    """Return the phase in which a process is, or was when it died."""
    found = [entry.phase for entry in entries if entry.phase != "stepped"]
    return found[-1] if found else "load"


def last_step(entries: list[Entry]) -> int:
    """Return the last step that a process has finished."""
    return max((entry.step for entry in entries if entry.phase == "stepped"), default=0)


def first_step(entries: list[Entry]) -> int | None:
    """Return after which step a process has begun to train; None if it has not."""
    return next((entry.step for entry in entries if entry.phase == "train"), None)


def note(trace: Path) -> None:
    """Let this process note its phases from now on."""
    file, write, done = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), os.write, 0

    def begin(phase: str) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        write(file, f"{phase}\t{done}\t{time.monotonic()}\n".encode())

    def begins(phase: str, end: str = "") -> Callable[[Any], Any]:
        def around(own: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                begin(phase)
                result = own(*args, **options)
                if end:
                    begin(end)
                return result

            return call

        return around

    def counted(phase: str, end: str = "") -> Callable[[Any], Any]:
        def around(own: Any) -> Any:
            def call(loop: Any) -> None:
                nonlocal done
                done = library.steps_done(loop)
                begin(phase)
                own(loop)
                done = library.steps_done(loop)
                if end:
                    begin(end)

            return call

        return around

    library.wrap(library.ENTER_WORLD, begins("load"))  # signals are caught by then, and all ranks are there
    library.wrap(library.STEP, counted("train", "stepped"))
    library.wrap(library.VALIDATE, counted("validate"))
    library.wrap(library.REMOVE, begins("rotate"))
    for name in (library.SAVE, library.SAVE_PARTS):
        library.wrap(name, begins("save"))
    for name in (library.FINAL_SAVE, library.SAVE_MODEL):
        library.wrap(name, begins("final save", "end"))


class WhenImported(MetaPathFinder):
    """Lets this process note its phases once it has imported the library; sitecustomize puts it in place."""

    def __init__(self, trace: str):
        self.trace = Path(trace)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != library.STORY or os.environ.get("RANK", "0") != "0":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def then(module: Any) -> None:
            execute(module)
            note(self.trace)

        spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec
