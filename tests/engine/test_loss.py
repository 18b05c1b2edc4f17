"""The losses of predictions and their gradients, against torch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from lora_alpaca.engine import equivalence
from lora_alpaca.engine.loss import ChunkedCrossEntropy, cross_entropy, piece_loss, piece_loss_in_place

EXACT = 1e-5


@pytest.mark.parametrize("of_piece", [piece_loss, piece_loss_in_place])
@pytest.mark.parametrize("piece_bytes", [1, 4 * 50 * 3, 2**20])
def test_the_losses_and_their_gradient_are_those_of_torch(of_piece, piece_bytes, monkeypatch):
    monkeypatch.setattr("lora_alpaca.engine.loss.PIECE_BYTES", piece_bytes)
    hidden, head = torch.randn(10, 8, requires_grad=True), torch.randn(50, 8)
    labels, weights = torch.randint(50, (10,)), torch.randint(1, 4, (10,)).float()
    expected = F.cross_entropy(hidden.double() @ head.double().t(), labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected, hidden, weights.double())
    expected = expected.float()
    found = ChunkedCrossEntropy.apply(hidden, head, labels, of_piece)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(found, hidden, weights)[0], gradient, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(ChunkedCrossEntropy.apply(hidden, head, labels, of_piece), expected, atol=1e-6)


def test_hidden_states_that_are_wider_than_what_autocast_computes_in():
    """As those of a base that is stored quantised, with norms in fp32, where the processor computes in bf16."""
    torch.manual_seed(0)
    hidden, head = torch.randn(6, 16), torch.randn(40, 16)
    labels = torch.randint(0, 40, (6,))
    exact = hidden.clone().requires_grad_()
    F.cross_entropy(exact @ head.T, labels, reduction="sum").backward()
    mixed = hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ChunkedCrossEntropy.apply(mixed, head, labels, piece_loss_in_place).sum().backward()
    assert mixed.grad.dtype == torch.float32
    assert torch.allclose(mixed.grad, exact.grad, atol=0.05)


def test_the_loss_of_logits_is_as_exact_as_that_of_a_plain_head():
    logits, labels = torch.randn(64, 49_152) * 2, torch.randint(49_152, (64,))
    logits[torch.arange(64), labels] += torch.linspace(14, 24, 64)
    judge = logits.double().requires_grad_()
    losses = F.cross_entropy(judge, labels, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), judge)
    for dtype, limit in ((torch.float32, EXACT), (torch.float64, 1e-7)):
        given = logits.clone().requires_grad_()
        found = cross_entropy(given, labels, dtype)
        assert found.dtype == dtype
        assert torch.equal(given, logits)
        assert equivalence.difference([found, *torch.autograd.grad(found.sum(), given)], [losses, expected]) < limit
    with torch.no_grad():
        assert equivalence.difference([cross_entropy(logits, labels)], [losses]) < EXACT
