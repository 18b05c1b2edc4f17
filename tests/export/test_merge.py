"""The merge, tensor by tensor: bit for bit what PEFT merges, without changing the model it reads from."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig

from lora_alpaca.errors import ExportError
from lora_alpaca.export.merge import Deltas, base_tensors, merge, merged_tensors
from lora_alpaca.models import lora

LLAMA = ["q_proj", "down_proj"]
ADAPTERS = {
    "plain": ("Llama", {"target_modules": LLAMA}),
    "rank-stabilised": ("Llama", {"target_modules": LLAMA, "use_rslora": True}),
    "DoRA": ("Llama", {"target_modules": LLAMA, "use_dora": True}),
    "ranks of its own": (
        "Llama",
        {"target_modules": LLAMA, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ),
    "biases": ("Qwen2", {"target_modules": LLAMA[:1], "lora_bias": True}),
    "embeddings": ("Llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "a head trained whole": ("Llama", {"target_modules": LLAMA, "modules_to_save": ["lm_head"]}),
    "Conv1D": ("GPT2", {"target_modules": ["c_attn", "c_proj"]}),
    "Conv1D with DoRA": ("GPT2", {"target_modules": ["c_attn"], "use_dora": True}),
}


CASES = [*((kind, torch.float32) for kind in ADAPTERS), ("plain", torch.bfloat16), ("DoRA", torch.bfloat16)]


@pytest.fixture(params=CASES, ids=str)
def model(request, tiny_model):
    """Return a model with an adapter of random tensors on it."""
    kind, dtype = request.param
    architecture, options = ADAPTERS[kind]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=dtype)
    return random_adapter(base, **options)


def random_adapter(base, **options):
    model = lora.with_lora(base, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            scale = 1 + 0.1 * torch.randn_like(parameter) if "magnitude" in name else 0
            parameter.data = parameter.data * scale if "magnitude" in name else 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def by_peft(model):
    """Return the tensors of the base as PEFT merges them."""
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    return dict(merged.named_parameters())


def test_every_tensor_is_what_peft_merges(model, by_peft):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = dict(merged_tensors(base_tensors(model), Deltas(model)))
    assert found.keys() == by_peft.keys()
    assert [name for name in found if not torch.equal(found[name], by_peft[name])] == []
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_merged_model_is_what_peft_merges(model, by_peft):
    layers = len(lora.lora_layers(model))
    merged, changed = merge(model)
    assert changed == layers
    found = dict(merged.named_parameters())
    assert found.keys() == by_peft.keys()
    assert [name for name in found if not torch.equal(found[name], by_peft[name])] == []


def test_a_delta_has_the_shape_of_its_tensor_and_is_what_the_merge_adds(model):
    deltas = Deltas(model)
    names = [name for name, _ in base_tensors(model) if name in deltas]
    assert names
    for name, tensor in base_tensors(model):
        if name in deltas:
            delta, merged = deltas.delta(name), deltas.merged(name, tensor)
            assert delta.shape == tensor.shape
            assert torch.allclose((tensor + delta).float(), merged.float(), atol=0.02)


def test_a_delta_is_scale_times_b_a_in_fp32(tiny_llama):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model = random_adapter(base, target_modules=LLAMA, use_rslora=True)
    name = "model.layers.1.self_attn.q_proj"
    layer = lora.lora_layers(model)[name]
    expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (6 / 4**0.5)
    delta = Deltas(model).delta(f"{name}.weight")
    assert delta.dtype == torch.float32
    assert torch.equal(delta, expected)


def test_tensors_come_one_by_one(tiny_llama):
    model = random_adapter(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), target_modules=LLAMA)
    taken = []
    tensors = ((taken.append(name) or name, tensor) for name, tensor in base_tensors(model))
    for number, (name, _) in enumerate(merged_tensors(tensors, Deltas(model)), start=1):
        assert len(taken) == number
        assert taken[-1] == name


def test_a_merge_that_is_not_finite_is_refused(tiny_llama):
    model = random_adapter(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), target_modules=LLAMA)
    layer = lora.lora_layers(model)["model.layers.0.self_attn.q_proj"]
    layer.get_base_layer().weight.data[0, 0] = float("inf")
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.q_proj\.weight holds NaN or infinity once"):
        merge(model)
