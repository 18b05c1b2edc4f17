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


def compiled(device: torch.device) -> tuple[Pointwise, str]:
    """Return functions that are compiled at their first use, for all lengths at once, and an empty text.

    Where nothing can be compiled, usually for want of a C++ compiler, return the eager ones, and why. One function
    tells it for all; what the others compute is probed where they are put in.
    """
    logits, labels = torch.randn(3, 64, device=device), torch.arange(3, device=device)
    try:
        functions = Pointwise(
            score=torch.compile(score, dynamic=True),
            rms_norm=torch.compile(rms_norm, dynamic=True),
            silu_gate=torch.compile(silu_gate, dynamic=True),
        )
        found, expected = (make(logits, labels, torch.ones_like(logits[:, 0])) for make in (functions.score, score))
    except Exception as error:  # the compiler's errors have no common base
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Pointwise(), reason
    if not all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True)):
        return Pointwise(), "what it makes computes something else"
    return functions, ""
