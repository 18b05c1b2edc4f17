"""What happens element by element, compiled into few passes over memory: norm, gate and the score of a loss piece."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lora_alpaca.engine.loss import Score, score, score_in_place

Tensors = Callable[..., torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return `x` [N, W] with rows of root mean square 1, times `weight` [W], as Llama computes it."""
    exact = x.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * exact.to(x.dtype)


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate) * up


@dataclass(frozen=True)
class Pointwise:
    """The functions to put in; `rms_norm` and `silu_gate` are None where the model's own serve as well."""

    score: Score = score_in_place
    rms_norm: Tensors | None = None
    silu_gate: Tensors | None = None


def compiled() -> Pointwise:
    """Return the functions for torch.compile to compile at their first use, for all lengths at once."""
    return Pointwise(
        score=torch.compile(score, dynamic=True),
        rms_norm=torch.compile(rms_norm, dynamic=True),
        silu_gate=torch.compile(silu_gate, dynamic=True),
    )


def trouble(functions: Pointwise, device: torch.device, dtype: torch.dtype) -> str:
    """Return why the compiled functions cannot be used here, or nothing: no C++ compiler, or wrong results."""
    assert functions.rms_norm is not None
    assert functions.silu_gate is not None
    x = torch.randn(3, 64, device=device, dtype=dtype)
    try:
        found = functions.silu_gate(x, x), functions.rms_norm(x, x[0], 1e-6), functions.score(x, x.argmax(1), x[:, 0])
    except Exception as error:  # the compiler's errors have no common base
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    expected = silu_gate(x, x), rms_norm(x, x[0], 1e-6), score(x, x.argmax(1), x[:, 0])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    pairs = zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True)
    wrong = any(not torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in pairs)
    return "it computes something else" if wrong else ""
