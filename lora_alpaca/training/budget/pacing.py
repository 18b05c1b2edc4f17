"""The pace of a run: how many steps there are, and at what rate, by its plan and by what its time allows."""

import math
from collections.abc import Callable

from lora_alpaca.data.sampler import Sampler
from lora_alpaca.errors import TrainingError
from lora_alpaca.planning.plan import Plan, eval_steps, most_steps, warmup_steps
from lora_alpaca.training.budget.countdown import Countdown, Outlook
from lora_alpaca.training.job import Job
from lora_alpaca.training.state import TrainState

MANY = 1000  # steps, of which a tenth is the longest warm-up
SETTLING = 4  # timed steps after which it is settled when to validate


class Pacing:
    """The end and the rates of a run. Without limits they are those of its plan, whatever its time.

    With limits, the plan follows the time: its number of steps is what is expected now, until the time is used. What
    the time decided is noted in the plan, so that a run without limits can be made by it again.
    """

    def __init__(
        self, job: Job, plan: Plan, sampler: Sampler, countdown: Countdown, state: TrainState, log: Callable[..., None]
    ):
        self._config, self._lengths, self._sampler = job.config, job.train.lengths, sampler
        self._plan, self._countdown, self._state, self._log = plan, countdown, state, log
        self._most = most_steps(job.config, len(job.train)) if countdown.is_limited else plan.total_steps
        self._unsettled = 0 if state.step else SETTLING
        if math.isinf(self._most) and not state.step:  # for a first step before which nothing is measured
            plan.warmup_steps = warmup_steps(job.config, MANY)
        self._told, self._has_ended = False, False
        self.outlook = Outlook()

    def look(self) -> None:
        """Find what the time allows, and let the plan follow it; every rank calls it.

        Raises TrainingError where not one step fits into the time.
        """
        if not self._countdown.is_limited:
            return
        state, plan = self._state, self._plan
        self.outlook = self._countdown.look(self._tokens(), plan.eval_steps)
        if self.is_at_end():
            return
        if self.outlook.allows_step:
            self._follow()
            return
        if state.step == 0:
            raise TrainingError(self._countdown.too_short())
        self._log(self._countdown.ended(state.step, self._epochs(state.step)))
        plan.total_steps, self._has_ended = state.step, True

    def _follow(self) -> None:
        """Let the plan have as many steps as the time allows, if steps have been timed."""
        state, plan = self._state, self._plan
        if math.isinf(self.outlook.steps):
            return
        plan.total_steps = int(min(self._most, state.step + max(1.0, self.outlook.steps)))
        plan.warmup_steps = warmup_steps(self._config, plan.total_steps)
        if self._unsettled:
            plan.eval_steps = eval_steps(self._config, plan.total_steps)
        if state.step:
            self._unsettled = max(0, self._unsettled - 1)
            if not self._told:
                self._log(self._countdown.describe(plan.total_steps, self._epochs(plan.total_steps), self._most))
            self._told = True

    def is_at_end(self) -> bool:
        """Return whether no step follows."""
        return self._has_ended or self._state.step >= self._most

    def allows_validation(self) -> bool:
        """Return whether to validate after this step, though it may not be the last."""
        step, plan = self._state.step, self._plan
        if not self._countdown.is_limited and step < len(plan.rates):
            return step in plan.validated_at
        return step % plan.eval_steps == 0 and (step == 0 or self.outlook.allows_validation)

    def note_step(self, rate: float) -> None:
        """Note the rate of a step that was made."""
        if self._countdown.is_limited:
            self._plan.rates.append(rate)

    def note_validation(self) -> None:
        """Note that the run validated after this step."""
        if self._countdown.is_limited:
            self._plan.validated_at.append(self._state.step)

    def rate(self) -> float:
        """Return the rate of the next step: by the share of the steps that are done, or of the time, if larger."""
        step, plan = self._state.step, self._plan
        if not self._countdown.is_limited:
            return plan.rates[step] if step < len(plan.rates) else plan.learning_rate(step, self._config)
        by_steps = step * (plan.total_steps / self._most)  # exactly the step where the steps end the run
        return plan.learning_rate(max(by_steps, self.outlook.share * plan.total_steps), self._config)

    def _tokens(self) -> int:
        """Return the tokens of the next step."""
        return int(self._lengths[self._sampler.rows(self._state.step)].sum())

    def _epochs(self, steps: int) -> float:
        return steps / self._sampler.steps_per_epoch
