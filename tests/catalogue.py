"""What the tests of the catalogue of bad inputs share: tests, and lines of tables, have their entry as id."""

import pytest


class Entries(set[str]):
    """The entries that some test of a file is about."""

    def entry(self, number):
        """Mark a test as the one of an entry, whose number becomes its id."""
        self.add(number)
        return pytest.mark.parametrize("number", [number])

    def cases(self, table, names):
        """Make every line of a table a test, whose id is the entry in its first column."""
        self.update(line[0] for line in table)
        return pytest.mark.parametrize(names, [pytest.param(*line[1:], id=line[0]) for line in table])
