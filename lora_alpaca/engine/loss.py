"""Cross-entropy where it is scored only, a piece at a time: logits are never kept, and never made for other tokens.

Shapes: T predictions, W width of the model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

PIECE_BYTES = 32 * 2**20  # of fp32 logits alive at a time
Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def score(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted loss, summed, and its gradient by the logits [piece, V], in their dtype."""
    exact = logits.float()
    log_sum = exact.logsumexp(-1, keepdim=True)  # [piece, 1]
    losses = log_sum - exact.gather(1, labels[:, None])  # [piece, 1]
    wanted = labels[:, None] == torch.arange(exact.shape[1], device=exact.device)  # [piece, V]
    grad = ((exact - log_sum).exp() - wanted.float()) * weights[:, None]
    return (losses.squeeze(1) * weights).sum(), grad.to(logits.dtype)


def score_in_place(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `score` returns, with few passes over memory where nothing is compiled; it overwrites the logits."""
    exact = logits.float()
    log_sum = exact.logsumexp(-1, keepdim=True)  # [piece, 1]
    losses = log_sum - exact.gather(1, labels[:, None])  # [piece, 1]
    grad = exact.sub_(log_sum).exp_()
    grad.scatter_add_(1, labels[:, None], -torch.ones_like(losses))
    return (losses.squeeze(1) * weights).sum(), grad.mul_(weights[:, None]).to(logits.dtype)


class ScoredCrossEntropy(torch.autograd.Function):
    """The loss of T predictions, summed over their weights, through a frozen head without a bias.

    Its gradient is made in the forward, while the logits of a piece are there. It is that of the sum: dividing by the
    number of labels comes later, or small gradients would vanish in fp16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [T, W]
        head: torch.Tensor,  # [V, W]
        labels: torch.Tensor,  # [T]
        weights: torch.Tensor,  # [T]
        score: Score,
    ) -> torch.Tensor:
        """Return the loss as an fp32 scalar."""
        total = weights.new_zeros(())
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        piece = max(1, PIECE_BYTES // (4 * head.shape[0]))
        for start in range(0, len(hidden), piece):
            part = slice(start, start + piece)
            loss, by_logits = score(hidden[part] @ head.t(), labels[part], weights[part])
            total += loss
            if grad is not None:
                torch.mm(by_logits, head, out=grad[part])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, by_loss: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """Return the gradient by `hidden`; nothing else learns."""
        (grad,) = ctx.saved_tensors
        return grad * by_loss.to(grad.dtype), None, None, None, None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the same for logits [T, V] of a head that does more than a product: an fp32 scalar."""
    return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()
