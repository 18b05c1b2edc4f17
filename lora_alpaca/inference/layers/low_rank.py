"""Adapters of plain LoRA beside a linear layer: two thin products, with nothing of PEFT's around them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F


class AtWork:
    """The name of the adapter that answers, which every layer that has adapters looks up."""

    def __init__(self, name: str):
        self.name = name

    def put(self, name: str) -> None:
        """Put another adapter to work."""
        self.name = name


class LowRank:
    """The forward of a linear layer with the product of one of several adapters added, or of none.

    `factors` are by adapter A [r, in] and B [out, r], B times its scale, both in the dtype that the layer computes in.
    """

    def __init__(self, layer: Any, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], at_work: AtWork):
        self.plain, self.factors, self.at_work = layer.forward, dict(factors), at_work

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.plain(x)
        factors = self.factors.get(self.at_work.name)
        if factors is None:
            return y
        a, b = factors
        return y + F.linear(F.linear(x.to(a.dtype), a), b).to(y.dtype)
