"""Checks of what the optimizer gets: the gradient of one step, however its rows are cut up, held to the judge's."""

import torch
import torch.nn.functional as F

from lora_alpaca.engine.equivalence import EXACT, ROUNDED, difference
from lora_alpaca.engine.loss import PIECE_BYTES, ChunkedCrossEntropy, piece_loss_in_place
from lora_alpaca.errors import ModelError
from lora_alpaca.selftest.bench import SEVERAL_PACKS, Bench
from lora_alpaca.selftest.finding import Finding, NotApplicable

WIDTH, VOCABULARY = 16, 2**15
PREDICTIONS = 5 * PIECE_BYTES // (2 * 4 * VOCABULARY)  # two chunks and a half


def packing(bench: Bench) -> Finding:
    """All rows in one pack, what they begin with computed once."""
    all_tokens = sum(len(example.ids) for example in bench.examples)
    try:
        found = bench.gradient("packing", engine="packed", token_budget=all_tokens)
    except ModelError as error:
        if bench.base.name == "demo" or "cannot take packs" not in str(error):
            raise
        raise NotApplicable(f"rows of this model are padded, not packed ({error})") from None
    return _held_to_judge(bench, found)


def accumulation(bench: Bench) -> Finding:
    """Several packs, and several padded micro-batches, whose rows have different numbers of labels."""
    packs = _held_to_judge(bench, bench.gradient("packs", token_budget=SEVERAL_PACKS))
    padded = _held_to_judge(bench, bench.gradient("padded", engine="padded", micro_batch_size=3))
    return max(packs, padded, key=lambda one: one.measured if one.passed else torch.inf)


def ranks(bench: Bench) -> Finding:
    """Two processes that each compute a share of the rows."""
    return _held_to_judge(bench, *bench.gradient_of_ranks("ranks"))


def sharding(bench: Bench) -> Finding:
    """Two processes that each hold a half of the base."""
    return _held_to_judge(bench, *bench.gradient_of_ranks("sharding"))


def chunked_loss(bench: Bench) -> Finding:
    """Random hidden states and a random head, in more than one chunk."""
    draw = torch.Generator().manual_seed(0)
    device = bench.spec.device
    hidden = torch.randn(PREDICTIONS, WIDTH, generator=draw).to(device).requires_grad_()
    head = torch.randn(VOCABULARY, WIDTH, generator=draw).to(device)
    labels = torch.randint(VOCABULARY, (PREDICTIONS,), generator=draw).to(device)
    weights = torch.rand(PREDICTIONS, generator=draw).to(device)
    losses = ChunkedCrossEntropy.apply(hidden, head, labels, piece_loss_in_place)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), hidden)
    exact = hidden.detach().cpu().double().requires_grad_()
    expected = F.cross_entropy(exact @ head.cpu().double().t(), labels.cpu(), reduction="none")
    (wanted,) = torch.autograd.grad((expected * weights.cpu()).sum(), exact)
    return Finding(difference([losses.detach().cpu(), gradient.cpu()], [expected.detach(), wanted]), EXACT)


def _held_to_judge(bench: Bench, found: torch.Tensor, note: str = "") -> Finding:
    exact = bench.is_exact or "gloo" in note  # those processes compute in fp32
    return Finding(difference([found], [bench.expected]), EXACT if exact else ROUNDED, note)
