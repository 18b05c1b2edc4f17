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

MESSAGE = 2**26  # numbers that a message has at most, but for a larger tensor; the gradients of an adapter are one
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
    """Every rank holds the whole model. Gradients and scalars of a step are summed in one message, on cards in two.

    Those of full finetuning are several messages, so that no copy of all of them is made.
    """

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
        totals = torch.stack([*scalars])
        on_cards = self._world.device.type == "cuda"
        if on_cards:  # over the host, and first: a sum over cards does not tell that a rank is missing
            totals = self._world.sum(totals.cpu())
        *full, last = _messages([parameter.grad for parameter in parameters if parameter.grad is not None])
        for grads in full:
            self._sum_in_place(grads)
        self._sum_in_place(last if on_cards else [*last, totals])
        return totals.tolist()

    def _sum_in_place(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum tensors over the ranks in one message."""
        message = self._world.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, total in zip(tensors, message.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def clip(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
        """Scale the gradients down to a norm, and return the norm before."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()

    def agreed(self, text: str) -> str:
        """Return the first text of all ranks that is not empty; every rank calls it."""
        return text if self._world.world_size == 1 else next(filter(None, self._world.gather(text)), "")

    def forget_gathered(self) -> None:
        """Do nothing: there are no copies."""

    def full_state(self, trainable: Trainable) -> State:
        """Return the trained tensors of this rank, which are those of all."""
        return trainable.state()

    def load_full_state(self, trainable: Trainable, tensors: State, where: str) -> None:
        """Put the tensors into this rank's model."""
        trainable.load_state(tensors, where)


def _messages(grads: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return gradients in the groups that are sent together, in their order; there is one at least."""
    groups: list[list[torch.Tensor]] = [[]]
    for grad in grads:
        if groups[-1] and sum(one.numel() for one in groups[-1]) + grad.numel() > MESSAGE:
            groups.append([])
        groups[-1].append(grad)
    return groups
