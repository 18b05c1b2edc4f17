"""The engine's loss and gradients are those of plain transformers, whatever the family; the model stays as it was."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from engines import CPU, error, fit, make, reference, rows, settings

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.engine import attention, equivalence, patches
from lora_alpaca.engine.loss import ChunkedCrossEntropy, piece_loss, piece_loss_in_place
from lora_alpaca.engine.packing import pack
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
    assert 1e-5 < equivalence.difference(found, expected) < 0.03


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


def test_a_packed_call_without_its_pack_is_an_error():
    model, packed = make("Llama").get_base_model(), pack(rows())
    with patches.packed_attention(model), pytest.raises(RuntimeError, match="brings no pack"):
        model(**packed.inputs() | {"pack": None}, use_cache=False)


def test_a_padded_call_within_packed_attention_is_what_it_always_is():
    model = make("Llama").get_base_model()
    ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    with patches.packed_attention(model):
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
        greedy = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False), greedy)


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


@pytest.mark.parametrize("of_piece", [piece_loss, piece_loss_in_place])
@pytest.mark.parametrize("piece_bytes", [1, 4 * 50 * 3, 2**20])
def test_the_losses_and_their_gradient_are_those_of_torch(of_piece, piece_bytes, monkeypatch):
    monkeypatch.setattr("lora_alpaca.engine.loss.PIECE_BYTES", piece_bytes)
    hidden, head = torch.randn(10, 8, requires_grad=True), torch.randn(50, 8)
    labels, weights = torch.randint(50, (10,)), torch.randint(1, 4, (10,)).float()
    expected = F.cross_entropy(hidden @ head.t(), labels, reduction="none")
    (gradient,) = torch.autograd.grad(expected, hidden, weights)
    found = ChunkedCrossEntropy.apply(hidden, head, labels, of_piece)
    assert torch.allclose(found, expected)
    assert torch.allclose(torch.autograd.grad(found, hidden, weights)[0], gradient, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(ChunkedCrossEntropy.apply(hidden, head, labels, of_piece), expected)


def rows_that_share_predictions():
    """Return rows in no order: one of them twice, and some whose prompts are learned and shared."""
    examples = rows(8, train_on_inputs=True)
    return [*examples[:5], examples[2], *examples[5:], *rows(3, seed=1), examples[2]]


@pytest.mark.parametrize("family", ["Llama", "Granite"])  # with a plain head, and with one that is not
@pytest.mark.parametrize("changes", [{"token_budget": 10_000}, {}, {"share_prefix": False}, {"engine": "padded"}])
def test_losses_by_row_are_those_of_rows_alone(family, changes):
    """And so are the gradients of whatever is computed from them, as preference losses are."""
    model, examples = make(family), rows_that_share_predictions()
    alone = [reference(model, [example]) for example in examples]
    factors = torch.arange(1.0, len(examples) + 1)
    expected = sum(factor * gradient for factor, (_, gradient) in zip(factors, alone, strict=True))
    parameters, found, gradient = lora.trainable_parameters(model), torch.zeros(len(examples)), 0
    with fit(model, settings(**changes), examples) as (engine, _):
        for batch in engine.batches(examples):
            losses = engine.losses(batch)
            by_row = batch.sum_by_row(losses)
            found[batch.rows] = by_row.detach()
            assert torch.allclose(engine.loss(batch), by_row.sum())
            grads = torch.autograd.grad((by_row * factors[batch.rows]).sum(), parameters)
            gradient = gradient + torch.cat([grad.flatten() for grad in grads])
    assert torch.allclose(found, torch.stack([loss for loss, _ in alone]), rtol=1e-5)
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_in_blocks_sees_what_attention_by_segment_sees():
    """FlexAttention runs forward on a CPU; its gradients are tested where there is a GPU."""
    packed = pack(rows())
    tokens = packed.input_ids.numel()
    query, key, value = torch.randn(1, 4, tokens, 16), torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16)
    expected = attention._by_segment(query, key, value, packed, 0.0, None)
    assert torch.allclose(attention._in_blocks(query, key, value, packed, 0.0, None), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [True, False])
def test_attention_in_blocks_has_the_same_gradients(share):
    packed = pack(rows(), share, "cuda")
    shapes = [(1, heads, packed.input_ids.numel(), 64) for heads in (4, 2, 2)]
    tensors = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    ours, expected = (
        torch.autograd.grad(attend(*tensors, packed, 0.0, None).square().sum(), tensors)
        for attend in (attention._in_blocks, attention._by_segment)
    )
    for one, other in zip(ours, expected, strict=True):
        assert (one - other).norm() / other.norm() < 1e-3


# ------------------------------------------------------------------------------------------------------ quantised bases


def quantised(folder, bits):
    """Return the adapted model of a folder with its base in so many bits, to be computed with in fp32."""
    spec, base = DeviceSpec(CPU, torch.float32, bits), locate_base(str(folder))
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
