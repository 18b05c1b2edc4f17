"""How a model is spread over the ranks, and how their gradients become one.

With `Replicated`, every rank holds the whole model, and one sum per step joins the gradients; `fsdp.Sharded` spreads
the weights. Gradients are of losses that are divided by the labels of the whole optimizer batch, so they are summed,
not averaged.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from lora_alpaca.distributed.world import World
from lora_alpaca.engine import ModelAccess, WholeModel
from lora_alpaca.models.base import Base, load_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.trainable import State, Trainable

Prepare = Callable[[Any], Any]  # base to model: attaches an adapter, or marks the parameters that learn


class Strategy(ModelAccess, Protocol):
    """What training asks of the ranks; every rank calls every method.

    Where `spreads_state`, no rank alone holds what is trained, and every rank takes part when it is saved.
    """

    spreads_state: bool

    def load(self, base: Base, spec: DeviceSpec, prepare: Prepare) -> tuple[Any, list[str]]:
        """Return the model that `prepare` makes of a base, spread over the ranks, and notes."""

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of a backward pass; only the last one of a step may communicate."""

    def reduce(self, parameters: Sequence[torch.nn.Parameter], scalars: Sequence[torch.Tensor]) -> list[float]:
        """Sum the gradients of parameters over the ranks, in place, and return the sums of some scalars."""

    def clip(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
        """Scale the gradients down to a norm, and return the norm before; a limit of infinity only measures."""

    def forget_gathered(self) -> None:
        """Let go of copies of weights that were changed in place."""

    def full_state(self, trainable: Trainable) -> State:
        """Return the trained tensors, whole and on the CPU, on the main rank."""

    def load_full_state(self, trainable: Trainable, tensors: State, where: str) -> None:
        """Put whole tensors into the model."""


class Replicated(WholeModel):
    """Every rank holds the whole model. Gradients and scalars of a step are summed in one message."""

    spreads_state = False

    def __init__(self, world: World):
        self._world = world

    def load(self, base: Base, spec: DeviceSpec, prepare: Prepare) -> tuple[Any, list[str]]:
        """Return the whole model, and notes on weights that were left out."""
        model, notes = load_base(base, spec)
        return prepare(model), notes

    def accumulate(self, is_last: bool) -> AbstractContextManager[None]:
        """Return a context that does nothing: a backward pass does not communicate."""
        return nullcontext()

    def reduce(self, parameters: Sequence[torch.nn.Parameter], scalars: Sequence[torch.Tensor]) -> list[float]:
        """Sum gradients and scalars over the ranks; a gradient that is missing counts as zero."""
        for parameter in parameters:
            if parameter.grad is None:  # this rank had no row, or the loss does not depend on the parameter
                parameter.grad = torch.zeros_like(parameter)
        if self._world.world_size == 1:
            return torch.stack([*scalars]).tolist()
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        message = self._world.sum(torch.cat([grad.flatten() for grad in grads] + [torch.stack([*scalars])]))
        summed, totals = message[: -len(scalars)], message[-len(scalars) :].tolist()
        for grad, total in zip(grads, summed.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))
        return totals

    def clip(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
        """Scale the gradients down to a norm, and return the norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()

    def forget_gathered(self) -> None:
        """Do nothing: there are no copies."""

    def full_state(self, trainable: Trainable) -> State:
        """Return the trained tensors of this rank, which are those of all."""
        return trainable.state()

    def load_full_state(self, trainable: Trainable, tensors: State, where: str) -> None:
        """Put the tensors into this rank's model."""
        trainable.load_state(tensors, where)
