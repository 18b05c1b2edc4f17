"""Run a command of ours inside the test's process, as a user would type it."""

import contextlib
import io
from typing import NamedTuple

from lora_alpaca.cli.verbs import main

NOTES = (
    "adapter ",
    "the adapter is ",
    "model ",
    "tokenizer: ",
    "warning: ",
)  # beginnings of lines on stderr that are no errors


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(verb: str, *words: object) -> Result:
    """Return exit code, stdout and stderr of `VERB --flag value ...`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([verb, *map(str, words)])
        except SystemExit as stop:
            code = stop.code or 0
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def error_in(text: str) -> str:
    """Return the one line of error in what a command printed; "" for a traceback, or more or fewer than one line."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    return lines[0] if len(lines) == 1 and "Traceback" not in text else ""


def error_line(result: Result, code: int) -> str:
    """Return the one line of error of a command that must end with an exit code; stderr has nothing else but notes."""
    assert result.code == code, result
    line = error_in(result.err)
    assert line, result.err
    assert all(other.startswith(NOTES) for other in result.err.splitlines() if other != line), result.err
    return line


def refused(verb: str, *words: object) -> str:
    """Return the one line of error of a command that must be refused with exit code 2, having printed nothing else."""
    result = run(verb, *words)
    line = error_line(result, 2)
    assert result.out == ""
    assert result.err.strip() == line
    return line
