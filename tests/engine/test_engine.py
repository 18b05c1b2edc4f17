"""The engine's loss and gradients are those of plain transformers, whatever the family; the model stays as it was."""

import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from engines import CPU, error, fit, large_and_sure, make, reference, rows, settings

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.engine import WholeModel, attention, equivalence, patches
from lora_alpaca.engine.reference import first_layers
from lora_alpaca.errors import ModelError
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec

EXACT = 1e-5
CASES = [  # every value of each factor meets every value of each other; `make exact` runs them all
    # family, beginnings shared, inputs learned, token budget (one pack or several), ranks
    ("Llama", True, False, 10_000, 1),
    ("Llama", False, True, 150, 2),
    ("Mistral", True, True, 10_000, 2),
    ("Mistral", False, False, 150, 1),
    ("Qwen2", True, False, 150, 2),
    ("Qwen2", False, True, 10_000, 1),
    ("Qwen3", True, True, 150, 1),
    ("Qwen3", False, False, 10_000, 2),
]


@pytest.mark.parametrize(("family", "share", "inputs", "budget", "ranks"), CASES)
def test_packs_have_the_gradients_of_rows_alone(family, share, inputs, budget, ranks):
    chosen = settings(share_prefix=share, token_budget=budget)
    name, off = error(make(family), rows(train_on_inputs=inputs), chosen, ranks)
    assert name == "packed"
    assert off < EXACT


PATHS = {
    "Gemma": "packed", "OPT": "packed", "GPT2": "packed", "Granite": "packed",
    "Falcon": "padded", "Bloom": "padded", "Mamba": "padded", "Gemma2": "padded",
}  # fmt: skip


@pytest.mark.parametrize("family", PATHS)
def test_every_family_trains_by_the_path_that_the_check_picks(family):
    name, off = error(make(family), rows(), settings())
    print(f"{family}: {name}")
    assert name == PATHS[family]
    assert off < EXACT


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"use_rslora": True}, {"lora_target_modules": ["o_proj", "up_proj"]}]
)
def test_any_adapter(lora):
    name, off = error(make("Llama", lora), rows(), settings())
    assert name == "packed"
    assert off < EXACT


def test_padded_on_demand():
    model, examples = make("Llama"), rows()
    name, off = error(model, examples, settings(engine="padded"))
    assert name == "padded"
    assert off < EXACT


def test_activations_are_recomputed_where_that_is_asked_for():
    model, examples = make("Llama").train(), rows()
    expected, calls = reference(model, examples), []
    model.enable_input_require_grads()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.get_base_model().model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(0))
    with fit(model, settings(engine="packed", checked=True, token_budget=10_000), examples) as (engine, _):
        model.train()  # which is when the library recomputes
        calls.clear()
        found = equivalence.loss_and_gradient(engine, examples, nullcontext)
    assert len(calls) == 2 * 2  # each of two layers, forward and once more for the backward
    assert equivalence.difference(found, expected) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["packed", "padded"])
def test_half_precision_differs_by_its_rounding(dtype, engine):
    examples = rows()
    expected = reference(make("Qwen3"), examples)
    model = make("Qwen3")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)

    def autocast():
        return torch.autocast("cpu", dtype)

    chosen = settings(engine=engine, dtype=dtype)
    with fit(model, chosen, examples, autocast) as (fitted_engine, _):
        found = equivalence.loss_and_gradient(fitted_engine, examples, autocast)
    assert fitted_engine.name == engine
    assert engine == "padded" or all(batch.input_ids.shape[1] % 32 == 0 for batch in fitted_engine.batches(examples))
    assert 1e-5 < equivalence.difference(found, expected) < 0.03


# ------------------------------------------------------------------------------------------------ what they are held to


def test_right_packs_are_taken_whatever_the_vocabulary():
    """torch's own loss of 49,152 pieces is off by more than the limit, where a model is sure of the right one."""
    model, examples = large_and_sure()
    assert error(model, examples, settings()) == ("packed", pytest.approx(0, abs=EXACT))


def mixed(share):
    """Return attention that lets every token see a little of the whole pack."""
    right = attention._by_segment

    def attend(query, key, value, pack, dropout, scale):
        wrong = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return (1 - share) * right(query, key, value, pack, dropout, scale) + share * wrong

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_fault_of_two_per_cent_is_seen_in_every_precision(tiny_llama, bits, dtype, monkeypatch):
    """16 bits round by more than that; what the message tells is enough to see that the limit was passed."""
    model, examples = quantised(tiny_llama, bits, dtype), rows()
    precision = partial(torch.autocast, "cpu", dtype) if dtype == torch.bfloat16 else nullcontext
    with fit(model, settings(dtype=dtype), examples, precision) as (engine, lines):
        assert engine.name == "packed"
        assert len(lines) == 1, lines
    monkeypatch.setattr(attention, "_by_segment", mixed(0.02))
    with fit(model, settings(dtype=dtype), examples, precision) as (engine, (line, _)):
        assert engine.name == "padded"
    found = re.search(
        r"this model cannot take packs: the gradient of a row in a pack is (\S+) off that of the row alone(.*), and "
        r"(\S+) is allowed \(rounding alone makes (\S+)\); padded rows are (\S+) times the tokens",
        line,
    )
    error, where, limit, rounding, cost = found.groups()
    assert 2 * 10 * float(rounding) <= 2 * float(limit) < float(error) < 0.03
    assert where == ("" if dtype == torch.float32 else " in the first 2 layers, in fp32")
    assert float(cost) > 1


PACKED = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "OPT", "GPT2", "GPTNeoX", "Glm", "Glm4", "Granite"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in PACKED), ("Llama", {"use_dora": True}), ("GPT2", {"use_dora": True})],
)
def test_a_slice_of_every_family_can_be_compared(family, changes):
    model, precision = make(family, changes), partial(torch.autocast, "cpu", torch.bfloat16)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    before = [(parameter.dtype, parameter.data_ptr()) for parameter in model.parameters()]
    with fit(model, settings(dtype=torch.bfloat16), rows(), precision) as (engine, lines):
        assert engine.name == "packed"
        assert len(lines) == 1, lines
    assert [(parameter.dtype, parameter.data_ptr()) for parameter in model.parameters()] == before


def test_a_noisy_model_has_a_wider_limit(monkeypatch):
    expected, again, packs = (torch.tensor([1.0 + off]) for off in (0.0, 1e-4, 5e-4))
    monkeypatch.setattr(equivalence, "loss_and_gradient", lambda *_: (packs, packs))
    packed = SimpleNamespace(access=WholeModel())
    found = equivalence.compare(packed, (expected, expected), lambda: (again, again), [], torch.float32)
    assert found.passed
    assert (found.error, found.noise, found.limit) == pytest.approx((5e-4, 1e-4, 1e-3), rel=1e-2)
    found = equivalence.compare(packed, (expected, expected), lambda: (again * 2, again), [], torch.float32)
    assert found.limit == equivalence.LARGEST  # whatever the noise


def test_a_slice_holds_every_kind_of_layer():
    window = {
        "use_sliding_window": True,
        "sliding_window": 64,
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 3, *["full_attention"] * 3],
    }
    for model, count in ((make("Llama", num_hidden_layers=5), 2), (make("Qwen2", **window), 4), (make("Bloom"), 2)):
        base = model.get_base_model()
        before = [name for name, _ in base.named_modules()]
        with first_layers(base) as layers:
            assert layers == count
            assert torch.isfinite(base(torch.arange(9)[None], use_cache=False).logits).all()
        assert [name for name, _ in base.named_modules()] == before


def test_a_model_that_cannot_be_sliced_is_compared_in_16_bits_and_that_is_said(monkeypatch):
    def no_fp32(*_):
        raise NotImplementedError("its kernels have 16 bits")

    monkeypatch.setattr("lora_alpaca.engine.reference.computing_in", no_fp32)
    model, precision = make("Llama").bfloat16(), partial(torch.autocast, "cpu", torch.bfloat16)
    with fit(model, settings(dtype=torch.bfloat16), rows(), precision) as (engine, lines):
        assert engine.name == "packed"
    assert lines[0] == "packs are compared in 16 bits only, where small faults do not show: its kernels have 16 bits"


# ----------------------------------------------------------------------------------------------- where packs do not fit


def said(model, examples, **changes):
    with fit(model, settings(**changes), examples) as (engine, lines):
        return engine.name, " ".join(lines)


def test_a_window_shorter_than_a_row():
    """The other rows fit into the window: only the longest, which is why it is in the check, does not."""
    examples = rows()
    longest = max(len(example.ids) for example in examples)
    name, line = said(make("Mistral", sliding_window=longest - 2), examples)
    assert name == "padded"
    assert f"window of {longest - 2} tokens is shorter than a row of {longest - 1}" in line
    assert said(make("Mistral", sliding_window=longest), examples)[0] == "packed"


def test_packs_that_leak_are_found_out(monkeypatch):
    def leaky(query, key, value, pack, dropout, scale):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(attention, "_by_segment", leaky)
    name, line = said(make("Llama"), rows())
    assert name == "padded"
    assert "this model cannot take packs: the gradient of a row in a pack is" in line


def test_packs_that_were_asked_for_and_cannot_be():
    with (
        pytest.raises(ModelError, match=r"--engine packed: this model cannot take packs: its attention is eager"),
        fit(make("Bloom"), settings(engine="packed"), rows()),
    ):
        pass


def test_a_resumed_run_does_not_check_again(monkeypatch):
    monkeypatch.setattr("lora_alpaca.engine.fitting.sample", None)
    model, examples = make("Llama"), rows()
    with fit(model, settings(engine="packed", checked=True), examples) as (engine, _):
        assert engine.name == "packed"


@pytest.mark.parametrize("architecture", ["Llama", "Falcon"])
def test_the_model_is_left_as_it_was_found(architecture):
    model, examples = make(architecture), rows()
    before = [(module, module.forward, list(vars(module))) for module in model.modules()]
    found, expected = model.get_base_model().config._attn_implementation, reference(model, examples)
    with pytest.raises(KeyError), fit(model, settings(), examples):
        raise KeyError
    assert model.get_base_model().config._attn_implementation == found
    assert all(module.forward == forward and list(vars(module)) == names for module, forward, names in before)
    assert all(torch.equal(one, other) for one, other in zip(reference(model, examples), expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------- parts


def rows_that_share_predictions():
    """Return rows in no order: one of them twice, and some whose prompts are learned and shared."""
    examples = rows(8, train_on_inputs=True)
    return [*examples[:5], examples[2], *examples[5:], *rows(3, seed=1), examples[2]]


@pytest.mark.parametrize("family", ["Llama", "Granite"])  # with a plain head, and with one that is not
@pytest.mark.parametrize("changes", [{"token_budget": 10_000}, {}, {"share_prefix": False}, {"engine": "padded"}])
@pytest.mark.parametrize("multiple", [1, 32])
def test_losses_by_row_are_those_of_rows_alone(family, changes, multiple):
    """And so are the gradients of whatever is computed from them, as preference losses are."""
    model, examples = make(family), rows_that_share_predictions()
    alone = [reference(model, [example]) for example in examples]
    factors = torch.arange(1.0, len(examples) + 1)
    expected = sum(factor * gradient for factor, (_, gradient) in zip(factors, alone, strict=True))
    parameters, found, gradient = lora.trainable_parameters(model), torch.zeros(len(examples)), 0
    with fit(model, settings(**changes), examples) as (engine, _):
        if engine.name == "packed":
            engine = replace(engine, multiple=multiple)
        for batch in engine.batches(examples):
            losses = engine.losses(batch)
            by_row = batch.sum_by_row(losses)
            found[batch.rows] = by_row.detach()
            assert torch.allclose(engine.loss(batch), by_row.sum())
            grads = torch.autograd.grad((by_row * factors[batch.rows]).sum(), parameters)
            gradient = gradient + torch.cat([grad.flatten() for grad in grads])
    assert torch.allclose(found.double(), torch.stack([loss for loss, _ in alone]), rtol=1e-5)
    assert (gradient - expected).norm() / expected.norm() < EXACT


def test_the_size_of_a_batch_is_halved_for_want_of_memory():
    model, examples = make("Llama"), rows()
    for changes, sizes in (({"token_budget": 200}, [200, 100, 50]), ({"engine": "padded"}, [3, 1])):
        with fit(model, settings(**changes), examples) as (engine, _):
            found = [engine]
            while smaller := found[-1].smaller():
                found.append(smaller)
        assert [engine.batch_size for engine in found] == sizes


def test_a_head_that_does_more_keeps_its_work():
    assert patches.has_plain_head(make("Llama").get_base_model())
    assert not patches.has_plain_head(make("Granite").get_base_model())
    assert not patches.has_plain_head(make("Gemma2").get_base_model())


# ------------------------------------------------------------------------------------------------------ quantised bases


def quantised(folder, bits, dtype=torch.float32):
    """Return the adapted model of a folder with its base in so many bits, to be computed with in a dtype."""
    spec, base = DeviceSpec(CPU, dtype, bits), locate_base(str(folder))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lora.attach(load_base(base, spec)[0], FinetuneConfig(lora_dropout=0.0), base)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def copy_dequantised(source, target):
    """Give the linear layers of an unquantised model the weights that bitsandbytes says a quantised one has."""
    layers = {name: part for name, part in source.named_modules() if type(part).__module__ == "bitsandbytes.nn.modules"}
    for name, part in layers.items():
        weight, state = part.weight, getattr(part.weight, "quant_state", None)
        exact = dequantize_4bit(weight.data, state) if state else int8_vectorwise_dequant(weight.CB, weight.SCB)
        target.get_submodule(name).weight.data.copy_(exact)
    return len(layers)


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_computes_with_its_dequantised_weights(tiny_llama, bits, engine):
    model, plain, examples = quantised(tiny_llama, bits), quantised(tiny_llama, 16), rows()
    assert copy_dequantised(model, plain) == 2 * 7  # layers x linear layers
    expected = reference(plain, examples)
    with fit(model, settings(engine=engine), examples) as (fitted_engine, _):
        found = equivalence.loss_and_gradient(fitted_engine, examples, nullcontext)
    assert equivalence.difference(found, expected) < 1e-3
    assert not any("forward" in vars(part) for part in model.modules())  # our parts are out again
