"""How the engine reaches a model whose weights may be spread over ranks; `WholeModel` is one that this rank holds."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is spread over ranks, of which this one holds a part: a DTensor."""
    return hasattr(tensor, "to_local")


def through(module: torch.nn.Module, compute: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
    """Return what `compute` returns, called in the place of a module's own forward.

    The weights of the module are in reach of it: the hooks around a forward gather what is sharded.
    """
    before = vars(module).pop("forward", None)
    module.forward = compute
    try:
        result: torch.Tensor = module(*args)
        return result
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class ModelAccess(Protocol):
    """What the engine asks for. Where ranks compute `in_lockstep`, every rank makes the same calls, in one order."""

    in_lockstep: bool

    def call(self, compute: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        """Return what a forward pass of the model returns for a batch, the weights in reach of it."""

    def gathered(self, module: torch.nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the weights of one part of the model are plain and whole on every rank."""

    def largest(self, number: float) -> float:
        """Return the largest of a number that every rank has found, so that all of them decide alike."""

    def agreed(self, text: str) -> str:
        """Return the first text of all ranks that is not empty, on all of them; every rank calls it."""


class WholeModel:
    """A model that this rank holds whole."""

    in_lockstep = False

    def call(self, compute: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        """Return what `compute` returns."""
        return compute(batch)

    def gathered(self, module: torch.nn.Module) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def largest(self, number: float) -> float:
        """Return the number."""
        return number

    def agreed(self, text: str) -> str:
        """Return the text."""
        return text
