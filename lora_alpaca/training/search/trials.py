"""Short runs of what is to be trained, each complete, each from the same first weights; nothing of them stays."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Example
from lora_alpaca.distributed import sharded_state
from lora_alpaca.errors import TrainingError
from lora_alpaca.planning.plan import Plan
from lora_alpaca.training.step import Stepper


class Trials:
    """Trials on a stepper: `train` are rows to train on, in their order, `held_out` those that judge.

    Every rank makes the same ones. A trial has the schedule of the run, shortened: its rate lands where that of the
    run does.
    """

    def __init__(
        self,
        stepper: Stepper,
        plan: Plan,
        config: FinetuneConfig,
        train: Sequence[Example],
        held_out: Sequence[Example],
    ):
        self.train, self.held_out = train, held_out
        self._stepper, self._plan, self._config = stepper, plan, config

    def loss(self, rate: float, steps: int, batch_size: int) -> float:
        """Return the mean loss on the held-out rows after so many steps at a peak rate; infinity where it diverges."""
        stepper, config = self._stepper, self._config.model_copy(update={"learning_rate": rate})
        share = self._plan.warmup_steps / self._plan.total_steps
        plan = replace(self._plan, total_steps=steps, warmup_steps=round(share * steps))
        with self._first_weights():
            for step in range(steps):
                first = step * batch_size
                rows = [self.train[row % len(self.train)] for row in range(first, first + batch_size)]
                stepper.world.seed(config.seed, step)
                if not stepper.step(rows, plan.learning_rate(step, config)).finite:
                    return math.inf
            try:
                return stepper.evaluate(self.held_out).loss
            except TrainingError:  # of a loss that is not finite
                return math.inf

    @contextmanager
    def _first_weights(self) -> Iterator[None]:
        """Put weights, moments and loss scale back, as they are now, when the context ends."""
        stepper, scaler = self._stepper, self._stepper.world.scaler
        weights = [sharded_state.local(one).detach().to("cpu", copy=True) for one in stepper.parameters]
        scale = scaler.state_dict() if scaler else None
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, first in zip(stepper.parameters, weights, strict=True):
                    sharded_state.local(parameter).copy_(first)
            stepper.strategy.forget_gathered()
            stepper.optimizer.zero_grad(set_to_none=True)
            stepper.optimizer.state.clear()
            if scaler and scale:
                scaler.load_state_dict(scale)
