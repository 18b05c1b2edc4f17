"""The search of the learning rate: short runs on the rows and the engine of the run itself, before its first step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Example
from lora_alpaca.data.sampler import Sampler
from lora_alpaca.errors import ConfigError, DataError
from lora_alpaca.planning import halving
from lora_alpaca.planning.budget import Budget, Meter, minutes
from lora_alpaca.planning.halving import Design, Trial
from lora_alpaca.planning.plan import Plan, most_steps
from lora_alpaca.training.job import Job
from lora_alpaca.training.progress import Progress
from lora_alpaca.training.search.trials import Trials
from lora_alpaca.training.step import Stepper

MOST_ROWS = 4096  # that trials learn; longer ones begin anew
FEWEST_ROWS = 4  # of which some can be held out


@dataclass(frozen=True)
class Found:
    """What a search has found: the rate of the run, the trial that won, and all trials in their order."""

    rate: float
    best: Trial
    design: Design
    trials: list[Trial]
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return what the record of the run keeps."""
        trials = {"trials": halving.as_facts(self.trials)}
        found = {"rate": self.rate, "best": self.best.rate, "steps": self.best.steps, "seconds": self.seconds}
        return found | trials | {"batch_size": self.design.batch_size, "judges": self.design.judges}

    def lines(self) -> list[str]:
        """Return a table of the losses, a line for every rate and a column for every horizon, and what follows."""
        horizons = sorted({trial.steps for trial in self.trials})
        losses = {(trial.rate, trial.steps): trial.loss for trial in self.trials}
        lines = ["     rate" + "".join(f"{f'{steps} steps':>11}" for steps in horizons)]
        for rate in sorted({trial.rate for trial in self.trials}):
            shown = [f"{losses[rate, steps]:11.4f}" if (rate, steps) in losses else "" for steps in horizons]
            lines.append(f"{rate:9.1e}" + "".join(shown).replace("inf", "diverges"))
        edge = halving.at_an_edge(self.best.rate, self.design.rates)
        planned = sum(rung.rates for rung in self.design.rungs)
        early = f"; there was time for {len(self.trials)} of {planned} trials" if len(self.trials) < planned else ""
        return [
            *lines,
            f"learning rate {self.rate:g}: {self.best.rate:.1e} is best after {self.best.steps} steps"
            + (f", the {edge} that was tried," if edge else "")
            + f" and the run is longer{early}; found in {minutes(self.seconds)}",
        ]


def decided(job: Job, plan: Plan, stepper: Stepper, progress: Progress, meter: Meter) -> Job:
    """Return the job with the learning rate that a search on its rows has found, which its record tells."""
    found = search(job, plan, stepper, progress, meter.left(), meter.now)
    options = job.record["options"] | {"learning_rate": found.rate}
    job.record.update(options=options, rate_search=found.facts())
    return replace(job, config=job.config.model_copy(update={"learning_rate": found.rate}))


def search(
    job: Job,
    plan: Plan,
    stepper: Stepper,
    progress: Progress,
    left: float = math.inf,
    now: Callable[[], float] = time.perf_counter,
) -> Found:
    """Return the learning rate for a run by this plan, the same on all ranks; what is trained is as it was before.

    `left` are the seconds that are left for the search and the run, whose steps are those that fit. The cost is told
    beforehand, by the time of a trial of one step. Raises DataError where the rows are too few, and ConfigError where
    the time is.
    """
    begun, config, world = now(), job.config, stepper.world
    train, held_out = _rows(job)
    rates, length = halving.GRID[config.tune], float(job.train.lengths.mean())
    run_rows, limit = float(plan.total_steps * config.batch_size), _seconds(config)
    design = halving.design(rates, halving.SHARE * run_rows, config.batch_size, length, len(held_out))
    judges = design.judges if limit == math.inf else min(design.judges, halving.FEWEST_JUDGES)  # of a time that counts
    trials = Trials(stepper, plan, config, train, held_out[:judges])
    for _ in range(2):  # the first one warms up
        trial = now()
        trials.loss(rates[0], 1, design.batch_size)
        per_row = world.largest((now() - trial) / (design.batch_size + judges * halving.PASS))
    if limit < math.inf:
        rows = world.broadcast(lambda: (begun + limit - now()) / per_row)
        design = halving.design(rates, rows, config.batch_size, length, len(held_out))
        if design.least > rows:
            raise ConfigError(
                f"{_named(config)}: a search of the learning rate may take {minutes(limit)} then, and takes about "
                f"{minutes(design.least * per_row)} at the least; give more, or name a --learning_rate"
            )
        trials = Trials(stepper, plan, config, train, held_out[: design.judges])
    if left < math.inf:
        in_time = world.broadcast(lambda: max(left - min(limit, left), 0.0) / per_row)
        most = most_steps(config, len(job.train)) * config.batch_size
        run_rows = min(most, max(in_time, float(config.batch_size)))
    progress.log(
        f"search of the learning rate: {design}; about {minutes(design.rows * per_row)}"
        + (f", at most {minutes(limit)}" if limit < math.inf else "")
        + f", and a run takes about {minutes(run_rows * per_row)}"
    )

    def has_time(steps: int) -> bool:
        needed = (steps * design.batch_size + design.judges * halving.PASS) * per_row
        return world.largest(now() - begun) + needed <= limit

    tried = halving.halved(design, lambda rate, steps: trials.loss(rate, steps, design.batch_size), has_time)
    best = halving.winner(design, tried)
    seen = best.steps * design.batch_size
    rate = halving.scaled(best.rate, seen, design.batch_size, run_rows, config.batch_size)
    found = Found(rate, best, design, tried, now() - begun)
    progress.log(*found.lines())
    return found


def _seconds(config: FinetuneConfig) -> float:
    """Return what a search may take: --find_lr_minutes, a tenth of a budget, or as long as its share of rows."""
    if config.find_lr_minutes is not None:
        return 60 * config.find_lr_minutes
    return Budget.of(config).in_seconds * halving.SHARE


def _named(config: FinetuneConfig) -> str:
    """Return the flags that limit the time of a search."""
    if config.find_lr_minutes is not None:
        return f"--find_lr_minutes {config.find_lr_minutes:g}"
    return str(Budget.of(config))


def _rows(job: Job) -> tuple[list[Example], list[Example]]:
    """Return the rows that trials learn, in the order of the run, and those that judge them, in random order."""
    train, seed = job.train, job.config.seed
    order = Sampler(train.lengths, len(train), seed).rows(0)
    if len(job.validation):
        judging = Sampler(job.validation.lengths, len(job.validation), seed).rows(0)
        return [train[row] for row in order[:MOST_ROWS]], [job.validation[row] for row in judging]
    if len(order) < FEWEST_ROWS:
        raise DataError(f"--learning_rate auto: {len(order)} rows are too few to judge a rate by; name one")
    held_out = order[-max(1, min(halving.MOST_JUDGES, len(order) // 4)) :]
    return [train[row] for row in order[: len(order) - len(held_out)][:MOST_ROWS]], [train[row] for row in held_out]
