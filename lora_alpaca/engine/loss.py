"""Cross-entropy of the predictions that have a label, a chunk at a time: all logits are never in memory together.

Shapes: T predictions, W width of the model, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

PIECE_BYTES = 32 * 2**20  # of fp32 logits in memory at a time, at least
CARD_ROWS = 1024  # that a card computes at a time, or it waits more than it computes
CARD_SHARE = 1 / 40  # of its memory, and no more rows than that; with what is made of them they take a sixteenth
PieceLoss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def piece_bytes(device: torch.device, vocabulary: int) -> int:
    """Return the bytes of the fp32 logits that are in memory at a time.

    They are by the whole memory of a card and not by what is free: that of a run that resumes is another, and so would
    its rounding be.
    """
    if device.type != "cuda":
        return PIECE_BYTES
    wanted = 4 * CARD_ROWS * vocabulary
    if torch.cuda.is_available():  # a plan may be for a card that is not here
        wanted = min(wanted, int(torch.cuda.get_device_properties(device).total_memory * CARD_SHARE))
    return max(PIECE_BYTES, wanted)


def piece_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log of the sum of exponentials, fp32 [piece], and the gradient of the losses by the logits [piece, V].

    A loss is that log less the logit of its label. It is not computed here: the compiler, given it too, rounds the log
    of one row in 10,000 otherwise, and runs would not repeat those of earlier versions to the bit.
    """
    exact = logits.float()
    log_sum = exact.logsumexp(-1, keepdim=True)  # [piece, 1]
    wanted = labels[:, None] == torch.arange(exact.shape[1], device=exact.device)  # [piece, V]
    grad = (exact - log_sum).exp() - wanted.float()
    return log_sum.squeeze(1), grad.to(logits.dtype)


def piece_loss_in_place(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `piece_loss` returns, with few passes over memory without a compiler; it overwrites the logits."""
    exact = logits.float()
    log_sum = exact.logsumexp(-1, keepdim=True)  # [piece, 1]
    grad = exact.sub_(log_sum).exp_()
    grad.scatter_add_(1, labels[:, None], -torch.ones_like(log_sum))
    return log_sum.squeeze(1), grad.to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The losses of T predictions, through a frozen head without a bias.

    The gradient is made in the forward, while the logits of a piece are in memory. It is that of the bare losses:
    weights and the division by the number of labels come later, or small gradients would vanish in fp16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [T, W]
        head: torch.Tensor,  # [V, W]
        labels: torch.Tensor,  # [T]
        piece_loss: PieceLoss,
    ) -> torch.Tensor:
        """Return the losses as fp32 [T]."""
        losses = torch.empty(len(hidden), device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _pieces(hidden, head):
            logits = hidden[part] @ head.t()
            of_labels = logits.gather(1, labels[part, None]).squeeze(1)  # before they are overwritten
            log_sum, by_logits = piece_loss(logits, labels[part])
            losses[part] = log_sum - of_labels
            if grad is not None and by_logits.dtype == head.dtype == grad.dtype:
                torch.mm(by_logits, head, out=grad[part])
            elif grad is not None:  # autocast computes in another dtype than the hidden states have
                grad[part] = by_logits @ head
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, by_losses: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Return the gradient by `hidden`; nothing else learns."""
        (grad,) = ctx.saved_tensors
        return grad * by_losses.to(grad.dtype)[:, None], None, None, None


class LearningHeadCrossEntropy(torch.autograd.Function):
    """The losses of T predictions, through a head without a bias that learns.

    What a loss weighs is known in the backward pass alone, and the head's gradient is a sum over predictions, so the
    logits of a piece are computed again there: a third more work, and nothing of their size is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,  # [T, W]
        head: torch.Tensor,  # [V, W]
        labels: torch.Tensor,  # [T]
        piece_loss: PieceLoss,
        dtype: torch.dtype,  # of the products
    ) -> torch.Tensor:
        """Return the losses as fp32 [T]."""
        losses = torch.empty(len(hidden), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(dtype)
            for part in _pieces(hidden, head):
                logits = hidden[part].to(dtype) @ weight.t()
                of_labels = logits.gather(1, labels[part, None]).squeeze(1)
                losses[part] = logits.float().logsumexp(-1) - of_labels
        ctx.save_for_backward(hidden, head, labels)
        ctx.piece_loss, ctx.dtype = piece_loss, dtype
        return losses

    @staticmethod
    def backward(ctx: Any, by_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """Return the gradients by `hidden` and `head`, the latter summed in fp32."""
        hidden, head, labels = ctx.saved_tensors
        largest = by_losses.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        shares = (by_losses / largest)[:, None]  # at most 1: 16 bits hold them whatever the loss is scaled by
        by_hidden, by_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(ctx.dtype)
            for part in _pieces(hidden, head):
                rows = hidden[part].to(ctx.dtype)
                _, by_logits = ctx.piece_loss(rows @ weight.t(), labels[part])
                by_hidden[part] = (by_logits @ weight) * by_losses[part, None]
                weighed = (rows * shares[part]).to(ctx.dtype)
                if ctx.dtype == torch.float32:
                    by_head.addmm_(by_logits.t(), weighed)
                else:
                    by_head += by_logits.t() @ weighed
        return by_hidden, by_head.mul_(largest).to(head.dtype), None, None, None


def _pieces(hidden: torch.Tensor, head: torch.Tensor) -> Iterator[slice]:
    """Yield the rows whose logits are in memory at a time."""
    piece = max(1, piece_bytes(hidden.device, head.shape[0]) // (4 * head.shape[0]))
    for start in range(0, len(hidden), piece):
        yield slice(start, start + piece)


def head_losses(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, piece_loss: PieceLoss) -> torch.Tensor:
    """Return the losses of predictions from hidden states [T, W], through a head [V, W] that is frozen or learns."""
    losses: torch.Tensor
    if not head.requires_grad:
        losses = ChunkedCrossEntropy.apply(hidden.to(head.dtype), head, labels, piece_loss)
        return losses
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    losses = LearningHeadCrossEntropy.apply(hidden, head, labels, piece_loss, dtype)
    return losses


class CrossEntropy(torch.autograd.Function):
    """The losses of T predictions, from their logits; the gradient is made in the forward, as in ChunkedCrossEntropy.

    torch's own is far less exact for a large vocabulary: of 49,152 pieces its gradient is off by 1.4e-4 in fp32.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the losses of logits [T, V] as `dtype` [T]."""
        losses = torch.empty(len(logits), dtype=dtype, device=logits.device)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        piece = max(1, piece_bytes(logits.device, logits.shape[1]) // (4 * logits.shape[1]))
        for start in range(0, len(logits), piece):
            part = slice(start, start + piece)
            exact, wanted = logits[part].to(dtype, copy=True), labels[part, None]
            log_sum = exact.logsumexp(-1, keepdim=True)  # [piece, 1]
            losses[part] = (log_sum - exact.gather(1, wanted)).squeeze(1)
            if grad is not None:
                by_logits = exact.sub_(log_sum).exp_()
                grad[part] = by_logits.scatter_add_(1, wanted, -torch.ones_like(log_sum))
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, by_losses: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient by the logits."""
        (grad,) = ctx.saved_tensors
        return grad * by_losses.to(grad.dtype)[:, None], None, None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the losses of logits [T, V], computed in `dtype`, as [T], for a head that is more than a product."""
    losses: torch.Tensor = CrossEntropy.apply(logits, labels, dtype)
    return losses
