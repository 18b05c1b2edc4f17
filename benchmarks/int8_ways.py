"""Ways to compute the products of 8-bit layers, beside today's: what benchmarks/int8_arithmetic.py compares."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lora_alpaca.engine import int8_linear
from lora_alpaca.engine.pointwise import _compile_once

LARGE = 6.0  # LLM.int8's threshold of an activation
LEAST_ROWS = 17  # that torch's product of int8 numbers takes


def rounded(x: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x` [N, W] times factors [W] as int8, and the scales [N, 1] of its rows."""
    exact = x.float() * factor
    largest = exact.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (exact * (127 / largest)).round().to(torch.int8), largest / 127


def rescaled(product: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return int32 numbers [N, W] times the scales of rows [N, 1] and columns [W], in fp32.

    A pass that also made bf16 of it would be four times slower: the compiler has no vector code from int32 to that.
    """
    return product.float() * rows * columns


def column_maxima(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute numbers [W] of columns."""
    return x.abs().amax(0)


def scaled(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return `x` [N, W] times fp32 numbers [W], rounded once."""
    return (x.float() * columns).to(x.dtype)


@dataclass(frozen=True)
class Way:
    """How the products of 8-bit layers are computed."""

    forward: bool = False
    backward: bool = False
    apart: bool = False
    one_pass: bool = False  # today's, with a compiled pass for the scales


WAYS = {
    "today": Way(),
    "today, scales compiled": Way(one_pass=True),
    "forward": Way(forward=True),
    "forward, columns apart": Way(forward=True, apart=True),
    "forward and backward": Way(forward=True, backward=True),
    "forward and backward, columns apart": Way(forward=True, backward=True, apart=True),
}


class Rounding:
    """The rounded activations of a layer, kept for the layers that have the same input."""

    def __init__(self) -> None:
        self.of: torch.Tensor | None = None
        self.kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.columns: list[int] = []  # how many were kept apart, input by input
        self.round, self.rescale = _compile_once(rounded), _compile_once(rescaled)
        self.maxima, self.scale = _compile_once(column_maxima), _compile_once(scaled)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, apart: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return int8 numbers, scales of rows, and the numbers of the columns that are zero in them."""
        if self.of is not x:
            rows, factor = x.reshape(-1, x.shape[-1]), torch.ones(x.shape[-1])
            large = (self.maxima(rows) > LARGE).nonzero().flatten() if apart else torch.zeros(0, dtype=torch.int64)
            factor[large] = 0
            self.kept = (*self.round(rows, factor), large)
            self.of = x
            self.columns.append(len(large))
        assert self.kept is not None
        return self.kept


def layers(way: Way, rounding: Rounding) -> Any:
    """Return what takes the place of `int8_linear.Int8Linear`."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(weight, scale)
            if not way.forward:
                y = x.reshape(-1, x.shape[-1]) @ weight.to(x.dtype).t()
                return rounding.scale(y, scale).view(*x.shape[:-1], -1)
            values, rows, large = rounding(x, way.apart)
            y = rounding.rescale(torch._int_mm(values, weight.t()), rows, scale).to(x.dtype)
            if len(large):
                part = (weight[:, large] * scale[:, None]).to(x.dtype)
                y.addmm_(x.reshape(-1, x.shape[-1])[:, large], part.t())
            return y.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, by_y: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            weight, scale = ctx.saved_tensors
            flat = by_y.reshape(-1, by_y.shape[-1])
            if way.backward:
                values, rows = rounding.round(flat, scale)
                ones = torch.ones(weight.shape[1])
                by_x = rounding.rescale(torch._int_mm(values, weight), rows, ones).to(by_y.dtype)
            elif way.one_pass:
                by_x = rounding.scale(flat, scale) @ weight.to(by_y.dtype)
            else:
                return today.backward(ctx, by_y)
            return by_x.view(*by_y.shape[:-1], -1), None, None

    today: Any = int8_linear.Int8Linear

    class Chosen:
        @staticmethod
        def apply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> Any:
            few = x.numel() // x.shape[-1] < LEAST_ROWS
            return (today if few or x.dtype != torch.bfloat16 or way == Way() else Product).apply(x, weight, scale)

    return Chosen


@contextmanager
def computing(way: Way, rounding: Rounding) -> Iterator[None]:
    """Within this context, 8-bit layers of all models compute in a way."""
    before = int8_linear.Int8Linear
    int8_linear.Int8Linear = layers(way, rounding)  # type: ignore[misc]
    rounding.of = None
    try:
        yield
    finally:
        int8_linear.Int8Linear = before  # type: ignore[misc]
