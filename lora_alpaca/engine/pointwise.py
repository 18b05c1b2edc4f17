"""Pointwise functions, compiled into few passes over memory: norm, gate and the loss of a piece.

Norm and gate have their gradients written out, so that forward and backward are two plain functions. Each is compiled
once, whether gradients are asked for or not, where the compiler's own differentiation would make one for every case.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lora_alpaca.engine.loss import PieceLoss, piece_loss, piece_loss_in_place
from lora_alpaca.errors import first_line

Tensors = Callable[..., torch.Tensor]
Gradients = Callable[..., tuple[torch.Tensor | None, ...]]
OPTIONS: dict[str, Any] = {
    "cpp.vec_isa_ok": True,  # it would build a test program for every instruction set that the processor has
    # 155 MB of headers that all of a user's programs share, and of which a kill leaves a part that fails ever after;
    # without it a first compilation takes 13 s, not 12
    "cpp_cache_precompile_headers": False,
}
WIDE = 8192  # columns from which the compiler makes of a sum what it makes for a vocabulary


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return `x` [N, W] with rows of root mean square 1, times `weight` [W], as Llama computes it."""
    exact = x.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * exact.to(x.dtype)


def rms_norm_gradients(
    by_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients by `x` and by the weight, the latter summed over the rows in fp32."""
    exact, by_normed = x.float(), (by_y * weight).float()
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)  # [N, 1]
    normed = exact * scale
    by_x = (scale * (by_normed - normed * (by_normed * normed).mean(-1, keepdim=True))).to(x.dtype)
    return by_x, (by_y.float() * normed.to(x.dtype).float()).sum(0).to(weight.dtype)


def rms_norm_gradient(
    by_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, None]:
    """Return the gradient by `x`, through a frozen weight."""
    exact, by_normed = x.float(), (by_y * weight).float()
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)  # [N, 1]
    normed = exact * scale
    return (scale * (by_normed - normed * (by_normed * normed).mean(-1, keepdim=True))).to(x.dtype), None


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate) * up


def silu_gate_gradient(by_y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients by `gate` and `up`."""
    exact, by_exact = gate.float(), by_y.float()
    chance = exact.sigmoid()
    by_gate = by_exact * up.float() * chance * (1 + exact * (1 - chance))
    return by_gate.to(gate.dtype), (by_exact * exact * chance).to(up.dtype)


@dataclass(frozen=True)
class Pointwise:
    """The functions of our layers; `rms_norm` and `silu_gate` are None where the model's own are as good."""

    piece_loss: PieceLoss = piece_loss_in_place
    rms_norm: Tensors | None = None
    silu_gate: Tensors | None = None


def compiled(device: torch.device, dtype: torch.dtype) -> tuple[Pointwise, str]:
    """Return functions that are compiled at their first use, for all lengths at once, and an empty text.

    Where nothing can be compiled, usually because there is no C++ compiler, return the eager ones and the reason. One
    function is compiled and compared here; the layers are compared when they replace those of a model.
    """
    logits, labels = torch.randn(3, WIDE, device=device).to(dtype), torch.arange(3, device=device)
    try:
        functions = made_by(_compile_once)
        found, expected = (loss(logits, labels) for loss in (functions.piece_loss, piece_loss))
    except Exception as error:  # the compiler's errors have no common base
        return Pointwise(), first_line(error)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    if not all(torch.allclose(one, other, atol=tolerance) for one, other in zip(found, expected, strict=True)):
        return Pointwise(), "what it makes computes something else"
    return functions, ""


def made_by(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Pointwise:
    """Return all the functions, each first given to `make`."""
    return Pointwise(
        piece_loss=make(piece_loss),
        rms_norm=_differentiable(make(rms_norm), make(rms_norm_gradient), make(rms_norm_gradients)),
        silu_gate=_differentiable(make(silu_gate), make(silu_gate_gradient)),
    )


def _compile_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled function that is shown every call in one form: each other form would be a graph of its own."""
    made = torch.compile(function, dynamic=True, options=OPTIONS)

    @functools.wraps(function)
    def call(*inputs: Any) -> Any:
        # `data`: whether a tensor is a view, or learns, is nothing to the compiler
        plain = [value.data if isinstance(value, torch.Tensor) else value for value in inputs]
        with torch.no_grad(), torch.autocast(plain[0].device.type, enabled=False):
            try:
                return made(*plain)
            except Exception as error:  # the compiler's errors have no common base
                if not _removed_broken_library(error):
                    raise
                return made(*plain)

    return call


def _removed_broken_library(error: BaseException | None) -> bool:
    """Remove the library that an error says cannot be loaded from the compiler's cache, and return whether it did.

    The compiler links into the place where it looks for what it has made: a kill meanwhile leaves a part of a file
    there, which fails in every later run.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # what compiles has imported it

    while error is not None and not isinstance(error, ImportError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    path = Path(error.path) if isinstance(error, ImportError) and error.path else None
    if path is None or path.suffix != ".so" or Path(cache_dir()) not in path.parents:
        return False
    path.unlink(missing_ok=True)
    return True


def _differentiable(function: Tensors, gradient: Gradients, learning: Gradients | None = None) -> Tensors:
    """Return a function of two tensors and constants that autograd differentiates by `gradient`.

    Where the second tensor learns, and `learning` is given, that is what it is differentiated by.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, one: torch.Tensor, other: torch.Tensor, *constants: float) -> torch.Tensor:
            ctx.save_for_backward(one, other)
            ctx.constants = constants
            return function(one, other, *constants)

        @staticmethod
        def backward(ctx: Any, by_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            chosen = learning if learning and ctx.needs_input_grad[1] else gradient
            return (*chosen(by_y, *ctx.saved_tensors, *ctx.constants), *(None for _ in ctx.constants))

    return Differentiable.apply
