"""Which learning rates are tried, for how long, and what the run's own rate is then: successive halving.

All rates of a log grid are tried for a few steps, the better half of them for twice as many, and so on down to two.
Each trial is a complete run, its schedule shortened. What is best in few steps is not what is best in many: the best
rate falls with the third root of the rows that a run sees (arXiv:2409.19913 measures powers of 0.2 to 0.4 over a
hundredfold of horizons), and rises with the root of the batch (arXiv:2205.10287). The rate that won is scaled by both.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

GRID = {  # eight rates, three in ten, around what is usual
    "lora": tuple(1e-4 * 10 ** (number / 3) for number in range(8)),
    "full": tuple(2e-6 * 10 ** (number / 3) for number in range(8)),
}
SHARE = 0.1  # of a run's work that a search takes, unless told
OF_HORIZON, OF_BATCH = -1 / 3, 1 / 2  # the powers by which the best rate grows with the rows seen, and the batch
TOKENS = 512  # of a step of a trial: smaller ones cost as much
FEWEST_STEPS = 2  # of the first trials
PASS = 1 / 3  # of the work on a row that is learned, the work on one that judges
JUDGES, FEWEST_JUDGES, MOST_JUDGES = 0.25, 8, 128  # share of the work that judges; rows that do


class Rung(NamedTuple):
    """So many rates that are tried for so many steps."""

    rates: int
    steps: int


@dataclass(frozen=True)
class Design:
    """What is tried: the rates, and of every trial the batch and the number of held-out rows that judge it."""

    rates: tuple[float, ...]
    rungs: tuple[Rung, ...]
    batch_size: int
    judges: int

    @property
    def rows(self) -> int:
        """Return the work of all trials, in rows that are learned."""
        return sum(map(self.rows_of, self.rungs))

    @property
    def least(self) -> int:
        """Return the work of the first trials, without which a search says nothing, in rows that are learned."""
        return self.rows_of(self.rungs[0])

    def rows_of(self, rung: Rung) -> int:
        """Return the work of the trials of one rung, in rows that are learned."""
        return math.ceil(rung.rates * (rung.steps * self.batch_size + self.judges * PASS))

    @property
    def longest(self) -> int:
        """Return the rows that the longest trial learns."""
        return self.rungs[-1].steps * self.batch_size

    def __str__(self) -> str:
        said = ", ".join(f"{rung.rates} rates x {rung.steps} steps" for rung in self.rungs)
        return f"{said}, of {self.batch_size} rows each, judged by {self.judges} held-out rows"


@dataclass(frozen=True)
class Trial:
    """The loss on the held-out rows after so many steps at a peak rate; infinity where it diverged."""

    rate: float
    steps: int
    loss: float


def design(rates: Sequence[float], rows: float, batch_size: int, tokens_per_row: float, judges: int) -> Design:
    """Return the trials that take about the work of learning `rows` rows, or the least that says anything.

    `batch_size` is that of the run, which trials have at most, and `judges` are the rows that are held out.
    """
    counts = [len(rates)]
    while counts[-1] > 2:
        counts.append(math.ceil(counts[-1] / 2))
    units = sum(count * 2**number for number, count in enumerate(counts))  # of the steps of the first trials
    judging = int(JUDGES * rows / PASS / sum(counts))
    judges = min(judges, max(FEWEST_JUDGES, min(MOST_JUDGES, judging)))
    left = max(0.0, rows - sum(counts) * judges * PASS) / units  # rows of a first trial
    batch = max(1, min(batch_size, math.ceil(TOKENS / tokens_per_row), int(left / FEWEST_STEPS)))
    steps = max(FEWEST_STEPS, int(left / batch))
    rungs = tuple(Rung(count, steps * 2**number) for number, count in enumerate(counts))
    return Design(tuple(rates), rungs, batch, judges)


def better(trials: Sequence[Trial], number: int) -> list[float]:
    """Return the rates of the best trials of one rung, in order; of equal ones the smaller."""
    ranked = sorted(trials, key=lambda trial: (trial.loss, trial.rate))
    return sorted(trial.rate for trial in ranked[:number])


def scaled(rate: float, rows: float, batch_size: int, run_rows: float, run_batch_size: int) -> float:
    """Return the rate of a run that sees `run_rows` rows, from the best of trials that saw `rows`, two digits of it.

    It is never more than what was tried.
    """
    factor = (run_rows / rows) ** OF_HORIZON * (run_batch_size / batch_size) ** OF_BATCH
    return float(f"{rate * min(1.0, factor):.1e}")


def at_an_edge(rate: float, tried: Collection[float]) -> str:
    """Return `largest` or `smallest` where that is what a rate is of those that were tried, or nothing."""
    return "largest" if rate == max(tried) else "smallest" if rate == min(tried) else ""


def as_facts(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return trials as JSON has them: a loss of infinity is none."""
    return [asdict(trial) | {"loss": trial.loss if math.isfinite(trial.loss) else None} for trial in trials]


def halved(design: Design, loss: Callable[[float, int], float], has_time: Callable[[int], bool]) -> list[Trial]:
    """Return the trials of a design in their order; `loss` makes the one of a rate and so many steps.

    They end early where there is no time for one of so many steps; those of the first rung are always made.
    """
    tried: list[Trial] = []
    left = list(design.rates)
    for rung in design.rungs:
        left = better(tried[-len(left) :], rung.rates) if tried else left
        for rate in left:
            if rung is not design.rungs[0] and not has_time(rung.steps):
                return tried
            tried.append(Trial(rate, rung.steps, loss(rate, rung.steps)))
    return tried


def winner(design: Design, trials: Sequence[Trial]) -> Trial:
    """Return the best trial of the longest horizon at which all rates were tried that were to be; else of the first."""
    for rung in reversed(design.rungs):
        done = [trial for trial in trials if trial.steps == rung.steps]
        if len(done) == rung.rates or rung is design.rungs[0]:
            (rate,) = better(done, 1)
            return next(trial for trial in done if trial.rate == rate)
    raise AssertionError("a design has a rung")
