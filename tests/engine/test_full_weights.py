"""Weights that learn themselves: gradients of every path against plain transformers in fp64, and what is spared."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from engines import error, fit, make_whole, rows, settings
from test_patches import eager

from lora_alpaca.engine import patches, pointwise
from lora_alpaca.engine.equivalence import difference
from lora_alpaca.engine.loss import LearningHeadCrossEntropy, head_losses, piece_loss, piece_loss_in_place

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "OPT", "GPT2"]


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_have_the_gradients_of_plain_transformers(family, engine, monkeypatch):
    monkeypatch.setattr(pointwise, "compiled", lambda device, dtype: (eager(), ""))
    name, off = error(make_whole(family), rows(), settings(engine=engine, compiled=True))
    assert name == engine
    assert off < 1e-5


@pytest.mark.parametrize("parts", ["all", "mlp"])
@pytest.mark.parametrize("family", ["Llama", "OPT", "GPT2"])
def test_the_last_layers_have_the_gradients_of_plain_transformers(family, parts, monkeypatch):
    monkeypatch.setattr(pointwise, "compiled", lambda device, dtype: (eager(), ""))
    model = make_whole(family, {"layers": "top:1", "layer_parts": parts})
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning and all(".1." in name for name in learning)
    assert all("attn" not in name and "norm" not in name and "ln_" not in name for name in learning) == (parts == "mlp")
    assert error(model, rows(), settings(compiled=True)) == ("packed", pytest.approx(0, abs=1e-5))


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_the_embeddings_has_the_gradients_of_both(tied):
    model = make_whole("Llama", tie_word_embeddings=tied)
    assert len([p for p in model.parameters() if p.shape[0] == 300]) == (1 if tied else 2)
    assert error(model, rows(), settings())[1] < 1e-5


# ------------------------------------------------------------------------------------------------------- the head


def head_case(scale=1.0):
    """Return hidden states, head, labels and weights of losses, and loss gradients by the first two in fp64."""
    hidden, head = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels, weights = torch.randint(50, (40,)), torch.randint(0, 4, (40,)).float() * scale
    exact = [hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()]
    losses = F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="none")
    return hidden, head, labels, weights, [losses.detach(), *torch.autograd.grad(losses, exact, weights.double())]


@pytest.mark.parametrize("of_piece", [piece_loss, piece_loss_in_place])
@pytest.mark.parametrize("piece_bytes", [1, 4 * 50 * 3, 2**20])
def test_a_head_that_learns_has_the_gradient_of_torch(of_piece, piece_bytes, monkeypatch):
    monkeypatch.setattr("lora_alpaca.engine.loss.PIECE_BYTES", piece_bytes)
    hidden, head, labels, weights, expected = head_case()
    losses = head_losses(hidden, head, labels, of_piece)
    assert difference([losses, *torch.autograd.grad(losses, [hidden, head], weights)], expected) < 1e-5
    with torch.no_grad():
        assert torch.equal(head_losses(hidden, head, labels, of_piece), losses)


def test_a_head_that_learns_under_autocast():
    hidden, head, labels, weights, expected = head_case()
    with torch.autocast("cpu", torch.bfloat16):
        losses = head_losses(hidden, head, labels, piece_loss_in_place)
    assert losses.dtype == torch.float32
    found = torch.autograd.grad(losses, [hidden, head], weights)
    assert [grad.dtype for grad in found] == [torch.float32] * 2
    assert difference([losses, *found], expected) < 0.02


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-16])
def test_a_head_that_learns_in_fp16_keeps_its_gradient_whatever_the_loss_is_scaled_by(scale):
    hidden, head, labels, weights, expected = head_case(scale)
    losses = LearningHeadCrossEntropy.apply(hidden, head, labels, piece_loss_in_place, torch.float16)
    assert difference([losses, *torch.autograd.grad(losses, [hidden, head], weights)], expected) < 0.01


def test_losses_that_weigh_nothing_give_a_head_no_gradient():
    hidden, head, labels, weights, _ = head_case()
    losses = head_losses(hidden, head, labels, piece_loss_in_place)
    assert not any(grad.any() for grad in torch.autograd.grad(losses, [hidden, head], 0 * weights))


# ------------------------------------------------------------------------------------------------- what is spared


@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_no_graph_is_kept_below_the_first_layer_that_learns(engine):
    model = make_whole("Llama", {"layers": "top:1"})
    seen = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, __, out, number=number: seen.update({number: out.requires_grad}))
    with fit(model, settings(engine=engine, checked=True), []) as (chosen, _):
        for batch in chosen.batches(rows()):
            chosen.loss(batch).backward()
    assert seen == {0: False, 1: True}


def test_frozen_layers_are_held_in_the_compute_dtype_and_learning_ones_in_fp32():
    model = make_whole("Llama", {"layers": "top:1"}, dtype=torch.bfloat16)
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    precision = partial(torch.autocast, "cpu", torch.bfloat16)
    with fit(model, settings(dtype=torch.bfloat16), rows(), precision) as (engine, _):
        assert engine.name == "packed"


def test_layers_below_those_that_learn_are_compared_too():
    """The first layers of a model in 16 bits are what packs are compared on, and nothing in them learns."""
    model = make_whole("Llama", {"layers": "top:1"}, dtype=torch.bfloat16, num_hidden_layers=4)
    kept = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with fit(model, settings(dtype=torch.bfloat16), rows(), partial(torch.autocast, "cpu", torch.bfloat16)) as (
        _,
        said,
    ):
        assert not any("small faults do not show" in line for line in said)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == kept


def test_a_norm_with_a_wrong_gradient_by_its_weight_is_not_put_in():
    def wrongly(*inputs):
        by_x, by_weight = pointwise.rms_norm_gradients(*inputs)
        return by_x, 1.02 * by_weight

    wrong = pointwise._differentiable(pointwise.rms_norm, pointwise.rms_norm_gradient, wrongly)
    for norm, found in ((wrong, {"LlamaMLP"}), (eager().rms_norm, {"LlamaMLP", "LlamaRMSNorm"})):
        model = make_whole("Llama")
        with patches.patched(model, torch.float32, eager(rms_norm=norm)):
            assert {type(part).__name__ for part in model.modules() if "forward" in vars(part)} == found


def test_a_bias_of_the_head_learns():
    model = make_whole("GPTJ")
    with torch.no_grad():
        model.lm_head.bias.zero_()
    assert error(model, rows(), settings())[1] < 1e-5
