"""What the budget of a run still allows, by what the run has measured of itself.

Time is kept for what comes after the last step: validation, report, saving and export. The main rank decides, so that
all ranks take the same steps at the same rates.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from lora_alpaca.distributed.world import World
from lora_alpaca.errors import ConfigError
from lora_alpaca.planning.budget import HOUR, PASSES, Meter, margin, minutes
from lora_alpaca.training.state import TrainState

RECENT = 8  # steps by which the time of the next one is told
SLOWER = 1.1  # times what was measured: what is not to end late


@dataclass(frozen=True)
class Outlook:
    """What is left of the time: the `share` that is used of all that steps will take, and what else ends in time.

    `steps` is how many more there will be. The default is that of a run without limits.
    """

    share: float = 0.0
    steps: float = math.inf
    allows_step: bool = True
    allows_validation: bool = True  # with its checkpoint, and a step after them
    allows_checkpoint: bool = True  # and a step after it


class Countdown:
    """The time of a run, counted down to the end of its budget.

    `tokens_a_step` is the mean; `ending` are the seconds that `saving`, `report` and `export` take after the last step,
    as estimated. What is measured is in `state.timings`, in seconds, so that a run that resumes knows it.
    """

    def __init__(
        self, meter: Meter, world: World, state: TrainState, tokens_a_step: float, ending: Mapping[str, float]
    ):
        self.meter, self._world, self._state, self._ending = meter, world, state, ending
        self._tokens = tokens_a_step
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds of a token, of the last steps
        self._seen, self._aside = (-2, 0.0, 1), 0.0  # step, time and tokens of the last look; seconds of other work
        self.is_limited = meter.budget.is_limited
        meter.resume(state.used, state.spent)

    def look(self, tokens: int, eval_steps: int) -> Outlook:
        """Return what the time allows before a step of so many tokens; every rank calls it, and gets the same."""
        return self._world.broadcast(lambda: self._look(tokens, eval_steps)) if self.is_limited else Outlook()

    def _look(self, tokens: int, eval_steps: int) -> Outlook:
        known, used = self._state.timings, self.meter.used()
        self._note_step(used, tokens)
        left = self.meter.left() - self.kept()
        first = used if self._state.first_step_at is None else self._state.first_step_at
        per_token = self._per_token()
        step = SLOWER * max(self._recent, default=per_token) * tokens
        checkpoint = known.get("checkpoint", self._ending["saving"])
        between = known.get("validation", 0.0) + checkpoint
        mean = per_token * self._tokens + between / eval_steps
        steps = max(0.0, left) / mean if per_token else math.inf
        ahead = max(1, int(steps)) * mean if per_token else max(0.0, left)  # whole steps only: the last ends the rate
        return Outlook(
            share=max(0.0, used - first) / max(used - first + ahead, 1e-9),
            steps=steps,
            allows_step=step <= left,
            allows_validation=step + SLOWER * between <= left,
            allows_checkpoint=step + SLOWER * checkpoint <= left,
        )

    def _note_step(self, used: float, tokens: int) -> None:
        """Note how long the step since the last look took, with all that comes with a step, but not with other work."""
        (step, then, its_tokens), now = self._seen, self._state.step
        if now == step + 1:
            self._recent.append(max(0.0, used - then - self._aside) / max(1, its_tokens))
            self._state.timings["token"] = median(self._recent)
        self._seen, self._aside = (now, used, tokens), 0.0

    def _per_token(self) -> float:
        """Return the seconds of a token of a step: of the last steps, or by a pass over validation rows, or 0."""
        known = self._state.timings
        return median(self._recent) if self._recent else known.get("token", PASSES * known.get("pass", 0.0))

    def kept(self) -> float:
        """Return the seconds that are kept for what comes after the last step."""
        known = self._state.timings
        measured = SLOWER * (known.get("validation", 0.0) + known.get("report", 0.0))
        saving = max(self._ending["saving"], SLOWER * known.get("checkpoint", 0.0))
        ending = saving + self._ending["report"] + self._ending["export"]
        return measured + ending + margin(self.meter.budget.in_seconds)

    # ---------------------------------------------------------------------------------------------------- measuring

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Measure the work within this context: `validation`, `checkpoint` or `report`."""
        begun = self.meter.now()
        yield
        self._state.timings[what] = took = self.meter.now() - begun
        self._aside += took

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the time of a step within this context; the first one begins the time for steps."""
        state = self._state
        if state.first_step_at is None:
            state.first_step_at = self.meter.used()
        yield
        state.used, state.spent = self.meter.used(), self.meter.spent() or 0.0

    # ----------------------------------------------------------------------------------------------------- in words

    def describe(self, total: int, epochs: float, most: float) -> str:
        """Return in a sentence what ends the run: its time, or the steps of its epochs, of which there are `most`."""
        kept = f"{minutes(self.kept())} are kept for what comes after the last step"
        if total < most:
            return f"time: about {total} steps, {epochs:.1f} epochs, fit into {self.meter.budget}; {kept}"
        return f"time: the {total} steps will end before {self.meter.budget}; {kept}"

    def expectation(self, steps: int, per_token: float, basis: str) -> str:
        """Return in a sentence what so many steps will take, at so many seconds for a token."""
        seconds, price = per_token * self._tokens * steps, self.meter.budget.price
        money = f", {seconds / HOUR * price:.2f} at {price:g} an hour" if price else ""
        return f"time: about {minutes(seconds)}{money} for {steps:,} steps, by {basis}"

    def too_short(self) -> str:
        """Return in a sentence that no step fits."""
        return (
            f"{self.meter.budget}: {minutes(self.meter.used())} have gone by, and {minutes(self.kept())} are kept for "
            "validation, saving and what else comes after the last step: not one step fits; give more"
        )

    def ended(self, steps: int, epochs: float) -> str:
        """Return in a sentence that the time has ended the run."""
        return (
            f"time: {minutes(self.meter.used())} of {self.meter.budget} are used, for {steps} steps, {epochs:.1f} "
            "epochs; what is left is for validation and saving"
        )


def require_time(meter: Meter, world: World) -> None:
    """Raise ConfigError where the budget is used up before anything heavy is loaded."""
    if meter.budget.is_limited and world.broadcast(meter.left) <= 0:
        raise ConfigError(f"{meter.budget}: {minutes(meter.used())} have gone by before the base is loaded; give more")
