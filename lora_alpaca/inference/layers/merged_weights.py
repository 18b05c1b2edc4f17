"""The weights of a model with an adapter added, held beside the base's own so that either may answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lora_alpaca.models.changes import Change, Whole, merged
from lora_alpaca.models.memory import free_and_total, gigabytes

MOST_LOST = 0.3  # of an adapter's change, by rounding the weights it is added to: what answers lose, decision 21 says
SAMPLE = 2**18  # values of a tensor that the loss is measured on


class NotMerged(Exception):
    """An adapter is better not added to the weights; the text says why."""


class MergedWeights:
    """The tensors that an adapter changes, twice: with it, and without. `put` puts those of `name`, or the base's.

    They are merged as an export merges them: in fp32, rounded once. Raises NotMerged where memory is short, or where
    rounding loses too much of the adapter's change, unless it is to be done `anyway`; then `note` says what is lost.
    """

    def __init__(self, model: Any, changes: Mapping[str, Sequence[Change]], name: str, anyway: bool = False):
        self.name, self.note = name, ""
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []  # layer, key, with it, without it
        self._error = self._change = 0.0
        base = {tensor: model.get_parameter(tensor) for tensor in changes}
        _require_memory(list(base.values()))
        for tensor, made in changes.items():
            own = base[tensor]
            try:
                exact = merged(own.data.cpu(), [(change, 1.0) for change in made], torch.float32)
            except (ValueError, RuntimeError) as error:
                raise NotMerged(f"{tensor} cannot be merged ({str(error).splitlines()[0]})") from None
            rounded = exact.to(own.dtype)
            if not any(isinstance(change, Whole) for change in made):
                self._measure(own.data.cpu(), exact, rounded)
            layer, _, key = tensor.rpartition(".")
            with_it = nn.Parameter(rounded.to(own.device), requires_grad=False)
            self._places.append((model.get_submodule(layer), key, with_it, own))
        lost = (self._error / self._change) ** 0.5 if self._change else 0.0
        if lost > MOST_LOST:
            what = f"rounding to {str(next(iter(base.values())).dtype).removeprefix('torch.')} loses {lost:.0%} of it"
            if not anyway:
                raise NotMerged(what)
            self.note = f", as asked: {what}"
        self.put(name)

    def put(self, name: str) -> None:
        """Put the weights with the adapter into their layers, or the base's own."""
        for layer, key, with_it, without in self._places:
            layer._parameters[key] = with_it if name == self.name else without

    def _measure(self, own: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Take note of how much of a tensor's change rounding loses, on some of its rows."""
        rows = slice(None, None, max(1, own.numel() // SAMPLE))
        self._error += float((rounded[rows].float() - exact[rows]).square().sum())
        self._change += float((exact[rows] - own[rows].float()).square().sum())


def _require_memory(parameters: Sequence[torch.Tensor]) -> None:
    """Raise NotMerged where there is no room for tensors once more, with as much to spare."""
    needed = sum(one.numel() * one.element_size() for one in parameters)
    free, _ = free_and_total(parameters[0].device)
    if 2 * needed > free:
        raise NotMerged(f"they would take {gigabytes(needed)} more, and {gigabytes(free)} are free")
