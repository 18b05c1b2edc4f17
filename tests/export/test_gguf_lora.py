"""Adapters alone as GGUF: what llama.cpp adds to a weight is what PEFT's own merge adds, and the rest is refused."""

import warnings

import gguf
import gguf_files
import pytest
import torch
from gguf_files import make, metadata, tensors
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_alpaca.errors import AdapterError, ModelError
from lora_alpaca.export.writers.gguf.lora import write_gguf_lora
from lora_alpaca.models.base import locate_base

KINDS = {
    "plain": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "ranks and alphas by name": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "down_proj": 7},
        "alpha_pattern": {"v_proj": 3},
    },
    "embeddings and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}


def adapter(base, folder, seed=0, **settings):
    """Save an adapter with random weights for a base, by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    kind = settings.pop("kind", LoraConfig)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        peft = get_peft_model(model, kind(**{"r": 4, "task_type": "CAUSAL_LM"} | settings))
        for parameter in (one for one in peft.parameters() if one.requires_grad):
            torch.nn.init.normal_(parameter, std=0.05)
        peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


def added(path):
    """Return name of a weight -> what llama.cpp adds to it, by its rule."""
    alpha = metadata(path)["adapter.lora.alpha"]
    read = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for name in {name.rpartition(".lora_")[0] for name in read}:
        a, b = read[f"{name}.lora_a"], read[f"{name}.lora_b"]
        if name == "token_embd.weight":  # a row of the left factor for each token
            a, b = a.T, b
            found[name] = alpha / b.shape[1] * (b @ a).T
        else:
            found[name] = alpha / b.shape[1] * b @ a
    return found


def merged_by_peft(base, folders, weights, out):
    """Save the base with adapters merged by PEFT, times their weights, and return the folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for folder, weight in zip(folders, weights, strict=True):
        peft = PeftModel.from_pretrained(model, folder)
        for part in peft.modules():
            if hasattr(part, "scaling") and isinstance(part.scaling, dict):
                part.scaling = {name: scale * weight for name, scale in part.scaling.items()}
        model = peft.merge_and_unload()
    model.save_pretrained(out)
    for path in base.iterdir():
        if not (out / path.name).exists():
            (out / path.name).write_bytes(path.read_bytes())
    return out


def require_what_peft_adds(base, folders, weights, tmp_path):
    path = write_gguf_lora(tmp_path, list(zip(folders, weights, strict=True)), locate_base(str(base)))
    merged = merged_by_peft(base, folders, weights, tmp_path / "merged")
    before, after = (
        {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(file).tensors}
        for file in (gguf_files.write(base, tmp_path / "a").path, gguf_files.write(merged, tmp_path / "b").path)
    )
    found = added(path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert found.keys() == changed
    for name in changed:
        torch.testing.assert_close(found[name], after[name] - before[name], rtol=0, atol=3e-6)
    return path


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
def test_what_llama_cpp_adds_is_what_peft_merges(name, tiny_model, tmp_path):
    base = make(name, tiny_model, tmp_path / "base")
    folder = adapter(base, tmp_path / "adapter", target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    path = require_what_peft_adds(base, [folder], [1.0], tmp_path)
    said = metadata(path)
    assert (said["general.type"], said["adapter.type"], said["adapter.lora.alpha"]) == ("adapter", "lora", 8.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora(kind, tiny_model, tmp_path):
    base = make("llama", tiny_model, tmp_path / "base")
    require_what_peft_adds(base, [adapter(base, tmp_path / "adapter", **KINDS[kind])], [1.0], tmp_path)


def test_several_adapters_with_weights_become_one(tiny_model, tmp_path):
    base = make("llama", tiny_model, tmp_path / "base")
    folders = [
        adapter(base, tmp_path / "one", target_modules=["q_proj", "v_proj"], r=3),
        adapter(base, tmp_path / "two", target_modules=["q_proj", "up_proj"], seed=1, lora_alpha=2),
    ]
    require_what_peft_adds(base, folders, [0.5, -1.5], tmp_path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "of model.layers.0.self_attn.q_proj.weight: llama.cpp adds plain LoRA alone"),
        ({"modules_to_save": ["lm_head"]}, "weights that were trained whole of lm_head.weight"),
        ({"bias": "lora_only"}, "weights that were trained whole of model.layers.0.self_attn.q_proj.bias"),
        ({"lora_bias": True}, "a trained bias of model.layers.0.self_attn.q_proj.bias"),
        ({"trainable_token_indices": [5, 6]}, "trained tokens of model.embed_tokens.weight"),
        ({"kind": LoHaConfig}, "LOHA of model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_what_llama_cpp_cannot_add_is_named(settings, reason, tiny_model, tmp_path):
    base = make("llama tied, with biases, Llama 3's rope", tiny_model, tmp_path / "base")
    model = "llama" if "modules_to_save" in settings or "trainable_token_indices" in settings else None
    base = make(model, tiny_model, tmp_path / "untied") if model else base
    folder = adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    with pytest.raises(AdapterError) as caught:
        write_gguf_lora(tmp_path, [(folder, 1.0)], locate_base(str(base)))
    assert reason in str(caught.value)
    assert "merge it with --format gguf" in str(caught.value)
    assert not (tmp_path / "adapter.gguf").exists()


def test_lora_on_embeddings_that_are_the_head_too_is_named(tiny_model, tmp_path):
    base = make("qwen3", tiny_model, tmp_path / "base")
    folder = adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(AdapterError, match="which is head and embeddings in one"):
        write_gguf_lora(tmp_path, [(folder, 1.0)], locate_base(str(base)))


def test_another_architecture_is_told_the_way_on(tiny_model, tmp_path):
    base = tiny_model("OPT")
    folder = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"this is opt; export with --format adapter, .*convert_lora_to_gguf\.py"):
        write_gguf_lora(tmp_path, [(folder, 1.0)], locate_base(str(base)))


def test_the_tensors_are_those_of_the_base_alone(tiny_model, tmp_path):
    base = make("llama", tiny_model, tmp_path / "base")
    path = write_gguf_lora(
        tmp_path, [(adapter(base, tmp_path / "adapter", target_modules=["q_proj"]), 1.0)], locate_base(str(base))
    )
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert names == {f"blk.{n}.attn_q.weight.lora_{part}" for n in (0, 1) for part in "ab"}
    assert path.stat().st_size < sum(tensor.nbytes for tensor in tensors(base).values()) / 10
