"""One optimizer step: micro-batches to gradients, one reduction over the ranks, one move of the adapter.

The loss is divided by the number of labels in the whole optimizer batch, over micro-batches and ranks, so that the
update is the same however the rows are cut up. (A mean of micro-batch means is 9 to 27 % wrong in the gradient.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_alpaca.adapters import State, trainable
from lora_alpaca.engine import Engine
from lora_alpaca.errors import TrainingError
from lora_alpaca.examples import Example
from lora_alpaca.ranks import Ranks


@dataclass
class Step:
    """What a step measured: mean loss per label, gradient norm before clipping, labels, and tokens over all ranks."""

    loss: float
    grad_norm: float
    labels: int
    tokens: int
    skipped: bool = False  # an fp16 overflow: the loss scale was lowered and nothing moved


class Learner:
    """The trainable parameters of a model and the optimizer that moves them, on one rank of many."""

    def __init__(self, engine: Engine, ranks: Ranks, weight_decay: float, max_norm: float):
        self.engine = engine
        self.model = engine.model
        self.ranks = ranks
        self.max_norm = max_norm
        self.parameters = trainable(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=weight_decay)

    def step(self, examples: Sequence[Example], learning_rate: float, number: int) -> Step:
        """Train on the rows of one optimizer batch, of which this rank takes its share; every rank calls it.

        Raises TrainingError before anything moves if the loss or the gradient is not finite.
        """
        self.model.train()
        labels = sum(example.scored() for example in examples)
        loss = torch.zeros((), device=self.ranks.device)
        own_labels = torch.zeros((), device=self.ranks.device)  # a tensor, for a number would make the device wait
        for batch in self.engine.batches(examples, self.ranks.rank, self.ranks.world_size):
            with self.ranks.autocast():
                part = self.engine.loss(batch) / labels
            self.ranks.backward(part)
            loss += part.detach()
            own_labels += batch.weights.sum()
        loss_value = self._reduce(loss, own_labels, labels)
        norm, scaler = self._unscaled_norm(), self.ranks.scaler
        overflow = scaler is not None and math.isfinite(loss_value) and not math.isfinite(norm)
        if not overflow and not (math.isfinite(loss_value) and math.isfinite(norm)):
            raise TrainingError(
                f"step {number}: the loss is {loss_value} and the gradient norm {norm}; nothing was changed by it. "
                "Lower --learning_rate, or try --dtype fp32 or --load_8bit False"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if scaler is not None:
            scaler.step(self.optimizer)  # does nothing after an overflow, which unscale_ has noted
            scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(example.input_ids) for example in examples)
        return Step(loss_value, norm, labels, tokens, skipped=overflow)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> float:
        """Return the mean loss per label over all rows, whatever the number of ranks and the micro-batch.

        Raises TrainingError if it is not finite: such an adapter is never the best, and never goes unnoticed.
        """
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64)  # loss, labels
        by_length = sorted(examples, key=lambda example: len(example.input_ids))  # like lengths: little padding
        for batch in self.engine.batches(by_length, self.ranks.rank, self.ranks.world_size):
            with self.ranks.autocast():
                loss = self.engine.loss(batch)
            totals += torch.tensor([loss.item(), batch.weights.sum().item()], dtype=torch.float64)
        loss_sum, labels = self.ranks.sum(totals).tolist()
        if not math.isfinite(loss_sum):
            raise TrainingError(f"the validation loss is {loss_sum}; try --dtype fp32, or a lower --learning_rate")
        return loss_sum / labels

    def _reduce(self, loss: torch.Tensor, own_labels: torch.Tensor, labels: int) -> float:
        """Sum gradients, loss and label count over all ranks in one message; return the loss.

        The count is known beforehand, so it is a check that all ranks train on the same rows.
        """
        for parameter in self.parameters:
            if parameter.grad is None:  # this rank had no row, or the loss does not depend on it
                parameter.grad = torch.zeros_like(parameter)
        if self.ranks.world_size == 1:
            return loss.item()
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        message = torch.cat([grad.flatten() for grad in grads] + [torch.stack([loss, own_labels])])
        message = self.ranks.sum(message)
        for grad, summed in zip(grads, message[:-2].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
        loss_value, counted = message[-2:].tolist()
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
