"""Run a command of ours inside the test's process, as a user would type it."""

import contextlib
import io
from typing import NamedTuple

from lora_alpaca.cli.verbs import main


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


def refused(verb: str, *words: object) -> str:
    """Return the one line on stderr of a command that must be refused with exit code 2."""
    result = run(verb, *words)
    assert result.code == 2, result
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    return lines[0]
