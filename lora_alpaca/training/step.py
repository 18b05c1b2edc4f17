"""One optimizer step: micro-batches to gradients, one reduction over the ranks, one update of what is trained.

The loss is divided by the number of labels in the whole optimizer batch, over micro-batches and ranks, so that the
update is the same however the rows are cut up. (A mean of micro-batch means is 9 to 27 % wrong in the gradient.)
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Example
from lora_alpaca.distributed.strategy import Strategy
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import Engine
from lora_alpaca.engine.batches import Batch
from lora_alpaca.errors import TrainingError
from lora_alpaca.models import memory
from lora_alpaca.models.trainable import State, Trainable
from lora_alpaca.training import optimizers
from lora_alpaca.training.embedding_noise import EmbeddingNoise

LESS = "lower --token_budget or --cutoff_len (with --engine padded, --micro_batch_size)"
Item = TypeVar("Item")


class ShortageError(TrainingError):
    """A rank is short of memory, of which the others need not know."""


@dataclass
class Step:
    """What a step measured: mean loss per label, gradient norm before clipping, labels, and tokens over all ranks."""

    loss: float
    grad_norm: float
    labels: int
    tokens: int
    overflow: bool = False  # of fp16: nothing was updated, and the loss scale was lowered

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers, but for an overflow of fp16. Otherwise nothing was updated."""
        return math.isfinite(self.loss) and (math.isfinite(self.grad_norm) or self.overflow)


@dataclass
class Evaluation:
    """The losses of some rows: the mean per label, and the sum over the labels of each row, in nats; and the time."""

    loss: float
    by_row: list[float]
    seconds: float


class Stepper:
    """What is trained, and the optimizer that updates it, on one rank of many.

    `advance` is called after each batch of a step or an evaluation with the rows that are done, all rows of it, and the
    tokens that are done, over all ranks; by what the host knows, so that no device is waited for.
    """

    def __init__(
        self,
        engine: Engine,
        trainable: Trainable,
        strategy: Strategy,
        world: World,
        config: FinetuneConfig,
        log: Callable[[str], None],
        advance: Callable[[int, int, int], None] = lambda done, rows, tokens: None,
    ):
        self.engine = engine
        self.trainable = trainable
        self.model = engine.model
        self.world = world
        self.parameters = trainable.parameters
        self.optimizer = optimizers.build(config, trainable.names, self.parameters)
        self._noise = EmbeddingNoise(self.model, config.neftune_alpha) if config.neftune_alpha else None
        self.strategy = strategy
        self._max_norm = config.max_grad_norm or math.inf
        self._shrinks = config.on_oom == "shrink"
        self._log, self._advance = log, advance

    def step(self, examples: Sequence[Example], learning_rate: float) -> Step:
        """Train on the rows of one optimizer batch, of which this rank takes its share; every rank calls it.

        Nothing is updated where loss or gradient are not finite. Until the update, a signal may end the step
        (StepAbandoned). Raises TrainingError where the memory is too small.
        """
        labels = sum(example.num_labels() for example in examples)
        scaler = self.world.scaler
        with self.world.stop.interruptible():
            loss = self._within_memory(lambda: self._gradient(examples, labels))
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            norm = self.strategy.clip(self.parameters, self._max_norm)
        step = Step(loss, norm, labels, sum(len(example.ids) for example in examples))
        step.overflow = scaler is not None and math.isfinite(loss) and not math.isfinite(norm)
        optimizers.set_rate(self.optimizer, learning_rate)
        if scaler is not None:
            if step.finite:
                scaler.step(self.optimizer)  # does nothing after an overflow, which unscale_ has noted
            scaler.update()
        elif step.finite:
            self.optimizer.step()
        return step

    def _gradient(self, examples: Sequence[Example], labels: int) -> float:
        """Compute the gradient of the mean loss of some examples, summed over all ranks, and return that loss.

        Raises MemoryShortage on all ranks if one of them has too little memory.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)  # of a step that was given up
        loss = torch.zeros((), device=self.world.device)
        own_labels = torch.zeros((), device=self.world.device)  # a tensor: a number would make the device wait
        shortage = ""
        try:
            for batch, is_last in self._batches(examples):
                with self.strategy.accumulate(is_last):
                    noise = self._noise.added(batch, examples, self.world.step_seed) if self._noise else nullcontext()
                    with self.world.autocast(), noise:
                        part = self.engine.loss(batch) / labels
                    self.world.backward(part)
                loss += part.detach()
                own_labels += batch.weights.sum()
        except (RuntimeError, MemoryError) as error:
            shortage = self._shortage(error)
        return self._reduce(loss, own_labels, labels, shortage)

    def _batches(self, examples: Sequence[Example]) -> Iterator[tuple[Batch, bool]]:
        """Yield this rank's batches of some examples, each with whether it is the last, and tell what is done."""
        ranks, rows, tokens = self.world.world_size, 0, 0
        for batch, is_last in _with_last(self.engine.batches(examples, self.world.rank, ranks)):
            yield batch, is_last
            if len(batch.row_index):  # a batch that only keeps pace with other ranks has none
                rows += len(batch.rows)
                tokens += sum(len(examples[row].ids) for row in batch.rows)
                self._advance(min(rows * ranks, len(examples)), len(examples), tokens * ranks)

    def _reduce(self, loss: torch.Tensor, own_labels: torch.Tensor, labels: int, shortage: str) -> float:
        """Sum gradients, loss and label count over all ranks in one message; return the loss.

        The count is known beforehand: it checks that all ranks train on the same rows. Where one rank is short of
        memory, all ranks know it from this message.
        """
        short = torch.full_like(loss, float(bool(shortage)))
        total, counted, ranks_short = self.strategy.reduce(self.parameters, [loss, own_labels, short])
        if ranks_short:
            raise memory.MemoryShortage(shortage or "on another rank")
        if self.world.world_size > 1 and counted != labels:
            raise TrainingError(
                f"the ranks counted {counted:.0f} labels in a step of {labels}: do all read the same data file?"
            )
        return total

    def _shortage(self, error: Exception) -> str:
        """Return what an error says of too little memory, or raise what is no shortage.

        Raises MemoryShortage where the other ranks compute in lockstep: they wait for this one in another call than
        the one that would tell them, and hear of it when this one ends.
        """
        text = memory.shortage(error)
        if self.strategy.in_lockstep:
            raise memory.MemoryShortage(text)
        return text

    def _within_memory(self, compute: Callable[[], Item]) -> Item:
        """Return what `compute` returns; under --on_oom shrink it is retried with ever smaller batches."""
        while True:
            try:
                return compute()
            except memory.MemoryShortage as error:
                smaller = self.engine.smaller() if self._shrinks and not self.strategy.in_lockstep else None
                if smaller is None:
                    may_shrink = not (self._shrinks or self.strategy.in_lockstep)
                    less = f"{LESS}, or say --on_oom shrink" if may_shrink else LESS
                    free = memory.describe_free(self.world.device)
                    raise ShortageError(f"out of memory ({error}); {free}; {less}") from None
                self._log(f"out of memory: going on with {smaller}; the optimizer batch stays as it is")
                self.engine = smaller
            memory.release(self.world.device)
            self.world.reseed()  # the same dropout, however far the attempt came

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> Evaluation:
        """Return the losses of rows, whatever the number of ranks and the micro-batch; every rank calls it.

        Raises TrainingError if they are not finite: such an adapter is never the best, and is always reported.
        """
        self.model.eval()
        begun = time.perf_counter()
        order = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))  # like lengths: little padding
        by_length = [examples[row] for row in order]
        with self.world.stop.interruptible():
            totals = self._within_memory(lambda: self._losses(by_length))
        loss, labels, *sums = totals.tolist()
        if not math.isfinite(loss):
            raise TrainingError(f"the validation loss is {loss}; try --dtype fp32, or a lower --learning_rate")
        by_row = [nats for _, nats in sorted(zip(order, sums, strict=True))]
        return Evaluation(loss / labels, by_row, time.perf_counter() - begun)

    def _losses(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return the summed loss, the number of labels, and the summed loss of each row, float64 [2 + rows]."""
        totals, shortage = torch.zeros(3 + len(examples), dtype=torch.float64), ""  # the last: ranks short of memory
        try:
            for batch, _ in self._batches(examples):
                with self.world.autocast():
                    losses = self.engine.losses(batch)
                loss, by_row = (losses * batch.weights).sum(), batch.sum_by_row(losses)
                totals[:2] += torch.tensor([loss.item(), batch.weights.sum().item()], dtype=torch.float64)
                totals[2:-1].index_add_(0, torch.tensor(batch.rows), by_row.double().cpu())
        except (RuntimeError, MemoryError) as error:
            shortage = self._shortage(error)
            totals = torch.zeros_like(totals)
            totals[-1] = 1
        totals = self.world.sum(totals)
        if totals[-1]:
            raise memory.MemoryShortage(shortage or "on another rank")
        return totals[:-1]

    @torch.no_grad()
    def not_finite(self, examples: Sequence[Example]) -> list[int]:
        """Return the indices of the examples whose own loss is not finite; this rank computes all of them."""
        self.model.eval()
        found = []
        for index, example in enumerate(examples):
            for batch in self.engine.batches([example]):
                with self.world.autocast():
                    if not torch.isfinite(self.engine.loss(batch)):
                        found.append(index)
        return found

    # ------------------------------------------------------------------------------------------------------ state

    def weights(self) -> State:
        """Return the trained tensors, whole and on the CPU; every rank calls it."""
        return self.strategy.full_state(self.trainable)

    def optimizer_state(self) -> State:
        """Return a copy of the optimizer's state on the CPU, named by parameter number and kind."""
        found = optimizers.state(self.optimizer, self._numbers(), self.parameters)
        return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}

    def _numbers(self) -> list[str]:
        return [str(number) for number in range(len(self.parameters))]

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the loss scale of fp16, None in other precisions."""
        return None if self.world.scaler is None else self.world.scaler.state_dict()

    def restore(self, weights: State, moments: State, scaler: dict[str, Any] | None) -> None:
        """Put back what `weights`, `optimizer_state` and `scaler_state` returned."""
        self.strategy.load_full_state(self.trainable, weights, "checkpoint")
        optimizers.load_state(self.optimizer, self._numbers(), self.parameters, moments)
        if self.world.scaler is not None and scaler:
            self.world.scaler.load_state_dict(scaler)


def _with_last(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Yield items, each with whether it is the last one."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True
