"""What a part of the programme tried, and what went wrong."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Counts of cases by name, a line for every case that did not end as promised, and figures that were measured."""

    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count."""
        self.counts[name] = self.counts.get(name, 0) + number

    def expect(self, true: bool, what: str) -> None:
        """Note a failure unless something is true."""
        if not true:
            self.failures.append(what)


def chosen(cases: list, share: float) -> list:
    """Return an evenly spread share of some cases, at least one."""
    number = max(1, round(len(cases) * share))
    return [cases[place * len(cases) // number] for place in range(number)]
