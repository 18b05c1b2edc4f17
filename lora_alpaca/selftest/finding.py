"""What a check finds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was measured, and the most that may be."""

    measured: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether what was measured is within the limit; NaN is not."""
        return self.measured <= self.limit


class NotApplicable(Exception):
    """A check that means nothing on this machine, or for this base model; the text says why."""
