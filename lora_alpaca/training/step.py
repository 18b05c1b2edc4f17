"""One optimizer step: micro-batches to gradients, one reduction over the ranks, one move of the adapter.

The loss is divided by the number of labels in the whole optimizer batch, over micro-batches and ranks, so that the
update is the same however the rows are cut up. (A mean of micro-batch means is 9 to 27 % wrong in the gradient.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import Engine
from lora_alpaca.errors import TrainingError
from lora_alpaca.models import memory
from lora_alpaca.models.lora import State, trainable_parameters

LESS = "lower --token_budget or --cutoff_len (with --engine padded, --micro_batch_size)"


@dataclass
class Step:
    """What a step measured: mean loss per label, gradient norm before clipping, labels, and tokens over all ranks."""

    loss: float
    grad_norm: float
    labels: int
    tokens: int
    overflow: bool = False  # of fp16: nothing moved, and the loss scale was lowered

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers, but for what fp16's loss scale mends. Otherwise nothing moved."""
        return math.isfinite(self.loss) and (math.isfinite(self.grad_norm) or self.overflow)


class Stepper:
    """The trainable parameters of a model and the optimizer that moves them, on one rank of many."""

    def __init__(self, engine: Engine, ranks: World, weight_decay: float, max_norm: float, shrinks: bool = False):
        self.engine = engine
        self.model = engine.model
        self.ranks = ranks
        self.max_norm = max_norm
        self.shrinks = shrinks
        self.parameters = trainable_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=weight_decay)

    def step(self, examples: Sequence[Example], learning_rate: float) -> Step:
        """Train on the rows of one optimizer batch, of which this rank takes its share; every rank calls it.

        Nothing moves where loss or gradient are not finite. Until something does, a signal may end it (StepAbandoned).
        Raises TrainingError where the memory is too small.
        """
        labels = sum(example.num_labels() for example in examples)
        with self.ranks.stop.may_abandon():
            loss = self._within_memory(lambda: self._gradient(examples, labels))
            norm = self._unscaled_norm()
        scaler = self.ranks.scaler
        step = Step(loss, norm, labels, sum(len(example.ids) for example in examples))
        step.overflow = scaler is not None and math.isfinite(loss) and not math.isfinite(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if scaler is not None:
            if step.finite:
                scaler.step(self.optimizer)  # does nothing after an overflow, which unscale_ has noted
            scaler.update()
        elif step.finite:
            self.optimizer.step()
        return step

    def _gradient(self, examples: Sequence[Example], labels: int) -> float:
        """Leave the gradient of the mean loss of some examples in the parameters, and return that loss.

        Raises MemoryShortage on all ranks if one of them has too little memory.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)  # of a step that was given up
        loss = torch.zeros((), device=self.ranks.device)
        own_labels = torch.zeros((), device=self.ranks.device)  # a tensor, for a number would make the device wait
        shortage = ""
        try:
            for batch in self.engine.batches(examples, self.ranks.rank, self.ranks.world_size):
                with self.ranks.autocast():
                    part = self.engine.loss(batch) / labels
                self.ranks.backward(part)
                loss += part.detach()
                own_labels += batch.weights.sum()
        except (RuntimeError, MemoryError) as error:
            shortage = memory.shortage(error)  # raises what is no shortage
        return self._reduce(loss, own_labels, labels, shortage)

    def _within_memory(self, compute: Callable[[], float]) -> float:
        """Return what `compute` returns; with `shrinks`, it is tried with ever smaller packs or micro-batches."""
        while True:
            try:
                return compute()
            except memory.MemoryShortage as error:
                smaller = self.engine.smaller() if self.shrinks else None
                if smaller is None:
                    less = LESS if self.shrinks else f"{LESS}, or say --on_oom shrink"
                    raise TrainingError(
                        f"out of memory ({error}); {memory.describe_free(self.ranks.device)}; {less}"
                    ) from None
                self.ranks.reporter.say(f"out of memory: going on with {smaller}; the optimizer batch stays as it is")
                self.engine = smaller
            memory.release(self.ranks.device)
            self.ranks.seed_again()  # the same dropout, however far the attempt came

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss per label over all rows, whatever the number of ranks and the micro-batch.

        Raises TrainingError if it is not finite: such an adapter is never the best, and never goes unnoticed.
        """
        self.model.eval()
        by_length = sorted(examples, key=lambda example: len(example.ids))  # like lengths: little padding
        with self.ranks.stop.may_abandon():
            mean = self._within_memory(lambda: self._mean_loss(by_length))
        if not math.isfinite(mean):
            raise TrainingError(f"the validation loss is {mean}; try --dtype fp32, or a lower --learning_rate")
        return mean

    def _mean_loss(self, examples: Sequence[Example]) -> float:
        totals, shortage = torch.zeros(3, dtype=torch.float64), ""  # loss, labels, ranks that are short of memory
        try:
            for batch in self.engine.batches(examples, self.ranks.rank, self.ranks.world_size):
                with self.ranks.autocast():
                    loss = self.engine.loss(batch)
                totals += torch.tensor([loss.item(), batch.weights.sum().item(), 0], dtype=torch.float64)
        except (RuntimeError, MemoryError) as error:
            shortage = memory.shortage(error)
            totals = torch.tensor([0, 0, 1], dtype=torch.float64)
        loss_sum, labels, short = self.ranks.sum(totals).tolist()
        if short:
            raise memory.MemoryShortage(shortage or "on another rank")
        return loss_sum / labels

    @torch.no_grad()
    def not_finite(self, examples: Sequence[Example]) -> list[int]:
        """Return the places among some examples of those whose own loss is not finite; this rank looks at all."""
        self.model.eval()
        found = []
        for place, example in enumerate(examples):
            for batch in self.engine.batches([example]):
                with self.ranks.autocast():
                    if not torch.isfinite(self.engine.loss(batch)):
                        found.append(place)
        return found

    def _reduce(self, loss: torch.Tensor, own_labels: torch.Tensor, labels: int, shortage: str) -> float:
        """Sum gradients, loss and label count over all ranks in one message; return the loss.

        The count is known beforehand, so it is a check that all ranks train on the same rows. Where one rank is short
        of memory, all hear of it here.
        """
        for parameter in self.parameters:
            if parameter.grad is None:  # this rank had no row, or the loss does not depend on it
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks.world_size == 1:
            if shortage:
                raise memory.MemoryShortage(shortage)
            return loss.item()
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        short = torch.full_like(loss, float(bool(shortage)))
        message = torch.cat([grad.flatten() for grad in grads] + [torch.stack([loss, own_labels, short])])
        message = self.ranks.sum(message)
        loss_value, counted, ranks_short = message[-3:].tolist()
        if ranks_short:
            raise memory.MemoryShortage(shortage or "on another rank")
        for grad, summed in zip(grads, message[:-3].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
        if counted != labels:
            raise TrainingError(
                f"the ranks counted {counted:.0f} labels in a step of {labels}: do all read the same data file?"
            )
        return loss_value

    def _unscaled_norm(self) -> float:
        """Take the fp16 loss scale out of the gradients, clip them, and return their norm before clipping."""
        if self.ranks.scaler is not None:
            self.ranks.scaler.unscale_(self.optimizer)
        limit = self.max_norm or math.inf
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()

    # ------------------------------------------------------------------------------------------------ its state

    def optimizer_state(self) -> State:
        """Return AdamW's moments on the CPU, named by parameter number and kind."""
        state = self.optimizer.state_dict()["state"]
        return {
            f"{number}.{kind}": value.detach().cpu().clone()
            for number, kinds in state.items()
            for kind, value in kinds.items()
        }

    def load_optimizer_state(self, tensors: State) -> None:
        """Put back what `optimizer_state` returned."""
        whole = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            number, _, kind = name.partition(".")
            whole["state"].setdefault(int(number), {})[kind] = tensor
        self.optimizer.load_state_dict(whole)
