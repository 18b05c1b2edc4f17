"""Steps by the compiled functions against the library: every kind of weight, many families, and what they refuse."""

import copy
import shutil
import threading

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.layers import kernels, products, steps
from lora_alpaca.inference.layers.decoder import Decoder
from lora_alpaca.inference.layers.low_rank import AtWork, LowRank
from lora_alpaca.inference.layers.weights import OtherWeights
from lora_alpaca.inference.sampling import BASE
from lora_alpaca.inference.scheduler import equivalence
from lora_alpaca.inference.scheduler.attention import Span, Step
from lora_alpaca.inference.scheduler.cache import Cache
from lora_alpaca.models import quantization

SIZES = {
    "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 128, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Llama, tied and biased": {"tie_word_embeddings": True, "attention_bias": True},
    "Llama, rotated slower": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }
    },
    "Mistral": {"sliding_window": 7},
    "Qwen2": {},
    "Qwen3": {},
}  # fmt: skip
THEIR_OWN = {"Gemma": {}, "Phi3": {"pad_token_id": 0}, "Granite": {"residual_multiplier": 0.3}, "Olmo2": {}}


@pytest.fixture(scope="module")
def functions():
    if not any(map(shutil.which, kernels.COMPILERS)) or torch.backends.cpu.get_cpu_capability() not in kernels.CAPABLE:
        pytest.skip("there is no C++ compiler, or the processor has no wide vectors")
    found = kernels.compile_source()
    assert found is not None
    return found


def model_of(family, dtype=torch.float32, **options):
    config = getattr(transformers, f"{family.partition(',')[0]}Config")(**SIZES | options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def texts(*lengths):
    numbers = torch.Generator().manual_seed(1)
    return [torch.randint(3, SIZES["vocab_size"], (length,), generator=numbers).tolist() for length in lengths]


def cache_for(model, rows, dtype=torch.float32):
    cache = Cache()
    cache.reserve(rows, 32, rows, 32)
    config = model.config
    shape = (cache.rows, config.num_key_value_heads, cache.length, config.head_dim)
    cache.layers = {n: tuple(torch.zeros(2, *shape, dtype=dtype)) for n in range(config.num_hidden_layers)}
    return cache


@torch.inference_mode()
def answered(decoder, cache, rows):
    """Return the logits of every token of texts, all of which are read at the same time, a token of each in a step."""
    found = [[] for _ in rows]
    for position in range(max(map(len, rows))):
        there = [row for row, ids in enumerate(rows) if position < len(ids)]
        step = Step(cache, [rows[row][position] for row in there], there, [position] * len(there), [])
        for row, logits in zip(there, decoder.logits(step, torch.arange(len(there))), strict=True):
            found[row].append(logits)
    return [torch.stack(logits) for logits in found]


@torch.inference_mode()
def alone(model, ids):
    return model(torch.tensor([ids])).logits[0].float()


def off(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_give_what_the_library_gives(family, functions):
    model, rows = model_of(family, **FAMILIES[family]), texts(5, 21, 12, 1, 9)
    decoder = Decoder(functions, model, BASE)
    for logits, ids in zip(answered(decoder, cache_for(model, 5), rows), rows, strict=True):
        assert off(logits, alone(model, ids)) < 1e-5


@pytest.mark.parametrize("family", THEIR_OWN)
def test_a_family_with_other_layers_is_left_to_the_library(family, functions):
    model = model_of(family, **THEIR_OWN[family])
    assert equivalence.check(model).reason == ""
    kept = scheduled(model, functions)
    assert off(first_logits(model), alone(model, texts(12)[0])[-1:]) < 1e-4
    assert kept.reason and not kept._decoders


def scheduled(model, functions, **others):
    """Return the steps of a model that has the functions already."""
    return steps.put_in(others.pop("adapters", None) or Adapters(model), kernels.Functions(functions))


@torch.inference_mode()
def first_logits(model):
    """Return the logits after a text of which the last token alone is read in a step without spans."""
    (ids,) = texts(12)
    cache = Cache()
    cache.reserve(1, 32, 1, 32)
    count = len(ids) - 1
    read = Step(cache, ids[:-1], [0] * count, list(range(count)), [Span(0, 0, count, 0)])
    model(**read.inputs(), logits_to_keep=torch.tensor([0]))
    last = Step(cache, ids[-1:], [0], [count], [])
    return model(**last.inputs(), logits_to_keep=torch.tensor([0])).logits[0].float()


def test_what_differs_from_the_library_is_not_used(functions):
    model = model_of("Llama")
    assert equivalence.check(model).reason == ""
    kept = scheduled(model, functions)
    expected = first_logits(model)
    assert list(kept._decoders) == [BASE] and off(expected, alone(model, texts(12)[0])[-1:]) < 1e-5

    other = model_of("Llama")
    equivalence.check(other)
    other.model.norm.register_forward_hook(lambda module, inputs, output: 1.1 * output)
    kept = scheduled(other, functions)
    assert off(first_logits(other), 1.1 * expected) < 1e-5
    assert "its logits would differ" in kept.reason and not kept._decoders


def test_an_answer_is_the_same_to_the_bit_whatever_is_answered_beside_it(functions):
    model, rows = model_of("Llama"), texts(9, 14, 3, 20, 7, 17, 5)
    decoder = Decoder(functions, model, BASE)
    together = answered(decoder, cache_for(model, 7), rows)
    for logits, ids in zip(together, rows, strict=True):
        (single,) = answered(decoder, cache_for(model, 1), [ids])
        assert torch.equal(single, logits)


def test_threads_change_no_bit(functions):
    model, rows = model_of("Llama"), texts(9, 4)
    decoder, threads = Decoder(functions, model, BASE), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            found.append(answered(decoder, cache_for(model, 2), rows))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for answers in found[1:] for one, other in zip(answers, found[0], strict=True))


def test_sixteen_bits_are_read_as_they_are(functions):
    model, rows = model_of("Llama", torch.bfloat16), texts(11, 6)
    decoder = Decoder(functions, model, BASE)
    exact = copy.deepcopy(model).float()
    for dtype in (torch.bfloat16, torch.float32):
        for logits, ids in zip(answered(decoder, cache_for(model, 2, dtype), rows), rows, strict=True):
            assert off(logits, alone(exact, ids)) < off(alone(model, ids), alone(exact, ids)) < 0.05


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_read_as_they_are(bits, functions, tmp_path):
    model_of("Llama", attention_bias=True).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization.bnb_config(bits, torch.float32)
    ).eval()
    quantization.disable_repacking(model)
    (ids,) = texts(10)
    decoder = Decoder(functions, model, BASE)
    (found,) = answered(decoder, cache_for(model, 1), [ids])
    for layer in model.modules():
        if quantization.eight_bit_weight(layer) is not None:
            layer.forward = plain(quantization.dequantised(layer), layer.bias)
        elif quantization.four_bit_parts(layer) is not None:
            layer.forward = plain(quantization.four_bit_weight(layer).float(), layer.bias)
    assert off(found, alone(model, ids)) < 1e-5


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_layers_multiply_with_the_activations_as_they_come(bits, compiled, functions, tmp_path, monkeypatch):
    model_of("Llama", attention_bias=True).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization.bnb_config(bits, torch.float32)
    ).eval()
    quantization.disable_repacking(model)
    if not compiled:
        monkeypatch.setattr(kernels.Functions, "ready", lambda self: None)
    products.put_in(model, kernels.Functions(functions))
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.down_proj):
        weight = quantization.dequantised(layer) if bits == 8 else quantization.four_bit_weight(layer)
        for shape in ((1, 1), (2, 3), (1, 8), (3, 7)):
            x = torch.randn(*shape, layer.in_features)
            with torch.inference_mode():
                assert off(layer(x), plain(weight.float(), layer.bias)(x)) < 1e-6
                assert off(layer(x.bfloat16()).float(), plain(weight.float(), layer.bias)(x.bfloat16().float())) < 0.01
    assert model.lm_head.forward.__func__ is torch.nn.Linear.forward


def plain(weight, bias):
    return lambda x: F.linear(x, weight, None if bias is None else bias.float())


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_adapters_beside_are_added(rank, functions):
    model, (ids,) = model_of("Llama"), texts(13)
    adapted = copy.deepcopy(model)
    options = {"r": rank, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = peft.get_peft_model(adapted, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            a, b = (getattr(layer, f"lora_{which}").default.weight.data for which in "AB")
            own = model.get_submodule(name)
            own.forward = LowRank(own, {"mine": (a, b * 16 / rank)}, AtWork("mine"))
    (found,) = answered(Decoder(functions, model, "mine"), cache_for(model, 1), [ids])
    (bare,) = answered(Decoder(functions, model, BASE), cache_for(model, 1), [ids])
    expected = alone(adapted, ids)
    assert off(found, expected) < 1e-5 < 0.1 < off(bare, expected)


def test_every_adapter_is_compared_and_has_its_own(functions):
    model = model_of("Llama")
    equivalence.check(model)
    own, other = model.model.layers[1].mlp.up_proj.weight, torch.nn.Parameter(torch.randn(128, 64), False)

    def put(name):
        model.model.layers[1].mlp.up_proj.weight = own if name == BASE else other

    put("mine")
    adapters = Adapters(model, ["mine"], put)
    kept = scheduled(model, functions, adapters=adapters)
    for name in ("mine", BASE, "mine", BASE):
        with adapters.using(name):
            assert off(first_logits(model), alone(model, texts(12)[0])[-1:]) < 1e-5
    assert sorted(kept._decoders) == sorted(["mine", BASE])


def test_weights_of_another_kind_are_refused(functions):
    model = model_of("Llama")
    for change in (torch.Tensor.half, torch.Tensor.double, lambda weight: weight.t().contiguous().t()):
        changed = copy.deepcopy(model)
        weight = changed.model.layers[0].mlp.up_proj.weight
        weight.data = change(weight.data)
        with pytest.raises(OtherWeights):
            Decoder(functions, changed, BASE)


# ------------------------------------------------------------------------------------------------------- the compiler


def test_the_functions_are_compiled_once_a_moment_after_they_are_missed(tmp_path, monkeypatch, functions):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    missed = kernels.Functions()
    before = set(threading.enumerate())
    for _ in range(kernels.WARM - 1):
        assert missed.ready() is None
    assert set(threading.enumerate()) == before
    missed.ready()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert missed.ready() is not None
    assert [path.suffix for path in (tmp_path / "lora_alpaca" / "kernels").iterdir()] == [".so"]
    assert kernels.Functions().ready() is not None


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_without_a_compiler_there_are_no_functions(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler == "broken":
        (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "g++").chmod(0o755)
    assert kernels.compile_source() is None
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path, monkeypatch, functions):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.compile_source() is not None
    (tmp_path / "lora_alpaca" / "kernels").chmod(0o777)
    assert kernels.load() is None


def test_a_model_in_sixteen_bits_is_scheduled_with_logits_in_fp32(functions):
    model = model_of("Llama", torch.bfloat16)
    kept = scheduled(model, functions)
    assert equivalence.check(model).reason == "" and kept.reason == ""
    assert first_logits(model).dtype == torch.float32 and list(kept._decoders) == [BASE]


@torch.inference_mode()
def test_tokens_that_are_alone_do_not_depend_on_prompts_in_the_step(functions):
    model, (ids, other) = model_of("Llama"), texts(9, 20)
    equivalence.check(model)
    scheduled(model, functions)
    first_logits(model)
    found = []
    for prompt in ([], other):
        cache = Cache()
        cache.reserve(2, 32, 2, 32)
        read = Step(cache, ids[:-1], [0] * 8, list(range(8)), [Span(0, 0, 8, 0)])
        model(**read.inputs(), logits_to_keep=torch.tensor([0]))
        spans = [Span(1, 0, len(prompt), 1)] if prompt else []
        rows, positions = [0, *[1] * len(prompt)], [8, *range(len(prompt))]
        step = Step(cache, [ids[-1], *prompt], rows, positions, spans)
        found.append(model(**step.inputs(), logits_to_keep=torch.arange(len(rows))).logits[0])
    assert torch.equal(found[0][0], found[1][0])
    assert off(found[1][0], alone(model, ids)[-1]) < 1e-5 and off(found[1][1:], alone(model, other)) < 1e-5


def test_layers_of_which_some_are_quantised_are_left_to_the_library(functions):
    model = model_of("Llama")
    layer = model.model.layers[1].self_attn
    layer.k_proj.to(torch.bfloat16)
    with pytest.raises(OtherWeights, match="some of its weights are quantised"):
        Decoder(functions, model, BASE)


def test_processors_without_wide_vectors_are_left_to_the_library(monkeypatch, functions):
    assert kernels.load() is not None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert kernels.load() is None and kernels.compile_source() is None
