"""What the tests of the catalogue of bad inputs share: every test, and line of a table, has its entry as id."""

from pathlib import Path

import pytest
from command import error_line, run

ENTRIES: set[str] = set()  # that a test of the modules imported so far is about
SHORT = ("--max_steps", 1, "--batch_size", 2, "--val_set_size", 2, "--cutoff_len", 96, "--load_8bit", "False")
ASK = ("--instruction", "Hello.", "--max_new_tokens", 2, "--temperature", 0)


def entry(number):
    """Mark a test as the one of an entry, whose number becomes its id."""
    ENTRIES.add(number)
    return pytest.mark.parametrize("number", [number])


def cases(table, names):
    """Make every line of a table a test, whose id is the entry in its first column."""
    ENTRIES.update(line[0] for line in table)
    return pytest.mark.parametrize(names, [pytest.param(*line[1:], id=line[0]) for line in table])


def line_of(verb, *words, code=2):
    """Return the one line that refuses a command, with its exit code, having written nothing."""
    before = sorted(Path().rglob("*"))
    line = error_line(run(verb, *words), code)
    assert sorted(Path().rglob("*")) == before
    return line


def launched(monkeypatch, **variables):
    """Set variables of a launcher."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
