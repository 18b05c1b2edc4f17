"""The budget of a run: the time and the money that it may take, and the clock that counts both.

The clock begins with the run: with the start of its process for a command, with the call for `finetune`. It goes on
where the run resumes. Nothing here imports anything heavy: the time of imports counts too.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from lora_alpaca.config import FinetuneConfig

HOUR = 3600.0  # seconds
PASSES = 3.0  # passes without a gradient that a step takes as long as
SHARE, FEWEST, MOST = 0.01, 2.0, 30.0  # of the time, in seconds: kept free for what nobody has measured


@dataclass(frozen=True)
class Budget:
    """What a run may take: seconds, and money at a price per hour, which is 0 where it is not known."""

    seconds: float = math.inf
    money: float = math.inf
    price: float = 0.0

    @classmethod
    def of(cls, config: FinetuneConfig) -> "Budget":
        """Return the budget that the options name."""
        return cls(
            seconds=60 * config.max_minutes if config.max_minutes is not None else math.inf,
            money=config.max_cost if config.max_cost is not None else math.inf,
            price=config.price_per_hour or 0.0,
        )

    @property
    def is_limited(self) -> bool:
        """Return whether there is a limit at all."""
        return math.isfinite(self.seconds) or math.isfinite(self.money)

    @property
    def in_seconds(self) -> float:
        """Return the seconds that a run may take in all, by the price that is known now."""
        return min(self.seconds, self.money / self.price * HOUR if self.price else math.inf)

    def __str__(self) -> str:
        """Return the limits as flags."""
        time_, money = f"--max_minutes {self.seconds / 60:g}", f"--max_cost {self.money:g}"
        return " and ".join([time_] * math.isfinite(self.seconds) + [money] * math.isfinite(self.money))


class Meter:
    """The seconds and the money that a run has used, those of its earlier processes included.

    `begun` is when it began, on the clock `now`.
    """

    def __init__(self, budget: Budget, begun: float, now: Callable[[], float] = time.perf_counter):
        self.budget, self.now = budget, now
        self._begun, self._spent = begun, 0.0  # the money is that of earlier processes
        self._before = 0.0

    def resume(self, used: float, spent: float) -> None:
        """Count on from what earlier processes have used."""
        self._before, self._spent = used, spent

    def used(self) -> float:
        """Return the seconds that the run has used."""
        return self._before + self.now() - self._begun

    def spent(self) -> float | None:
        """Return the money that the run has used, None where the price is not known."""
        return self._spent + (self.now() - self._begun) / HOUR * self.budget.price if self.budget.price else None

    def left(self) -> float:
        """Return the seconds until the budget is used up; below 0 after that."""
        spent = self.spent()
        by_money = math.inf if spent is None else (self.budget.money - spent) / self.budget.price * HOUR
        return min(self.budget.seconds - self.used(), by_money)


def process_start() -> float:
    """Return when this process began, on the clock `time.perf_counter`; of a launched one, when its launcher did."""
    own = psutil.Process()
    begun = own.create_time()
    if "TORCHELASTIC_RUN_ID" in os.environ and (launcher := own.parent()) is not None:
        begun = min(begun, launcher.create_time())
    return time.perf_counter() - max(0.0, time.time() - begun)


def margin(seconds: float) -> float:
    """Return the seconds of a budget that are kept free."""
    return min(MOST, max(FEWEST, SHARE * seconds))


def minutes(seconds: float) -> str:
    """Return a duration as people read it: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
