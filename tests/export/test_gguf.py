"""GGUF files as transformers' own reader reads them, tensors that come back, and what is refused.

llama.cpp itself, and its converters, are in tests/clients.
"""

import importlib.util
import json

import gguf
import gguf_files
import pytest
import torch
from gguf_files import facts_of, make, metadata, tensors, with_config, write
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_alpaca.artifacts.chat_template import outgoing
from lora_alpaca.errors import ConfigError, ExportError, ModelError
from lora_alpaca.export.writers.gguf import require_package
from lora_alpaca.export.writers.gguf.writer import GgufWriter

IDS = torch.tensor([[5, 40, 7, 300, 12, 80, 9, 33, 200, 4]])
READ_BY_TRANSFORMERS = ["llama", "mistral", "qwen2", "phi3"]
WEIGHTS_READ = [
    "llama without grouped queries, rope scaled linearly",
    "gemma2",
    "gemma3",
]  # their config is read in part
ERROR = {  # the most that a value is off, as a part of the largest of its block: half a step, and its rounding
    "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-11, "q5_1": 1 / 31 + 2**-9, "q5_0": 1 / 16 + 2**-11,
    "q4_1": 1 / 15 + 2**-9, "q4_0": 1 / 8 + 2**-11,
}  # fmt: skip


def as_transformers_reads(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("name", [*READ_BY_TRANSFORMERS, *WEIGHTS_READ])
def test_transformers_reads_the_model_from_the_file(name, tiny_model, tmp_path):
    folder = make(name, tiny_model, tmp_path / "model")
    found = as_transformers_reads(write(folder, tmp_path / "out").path)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if name in WEIGHTS_READ:
        expected.load_state_dict(found.state_dict())
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert (found(IDS).logits - expected(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", gguf_files.MODELS)
def test_every_tensor_comes_back_as_the_base_has_it(name, tiny_model, tmp_path):
    folder = make(name, tiny_model, tmp_path / "model")
    writer = write(folder, tmp_path / "out")
    read, base = writer.read_back(), tensors(folder)
    left_out = {"lm_head.weight"} if name.startswith("gemma") else set()
    assert read.infos.keys() == base.keys() - left_out
    for key in read.infos:
        torch.testing.assert_close(read.read(key), base[key].float(), rtol=0, atol=1e-6)
    assert abs(writer.bytes_needed() / writer.path.stat().st_size - 1) < 0.2


@pytest.mark.parametrize("gguf_type", ERROR)
def test_quantising_costs_what_the_type_says(gguf_type, tiny_model, tmp_path):
    folder = tiny_model("Qwen2")
    writer = write(folder, tmp_path, gguf_type)
    read, base = writer.read_back(), tensors(folder)
    worst = 0.0
    for name, tensor in base.items():
        blocks = (tensor.reshape(-1, 32), read.read(name).reshape(-1, 32))
        largest = blocks[0].abs().max(dim=1, keepdim=True).values.clamp(min=1e-9)
        if tensor.dim() == 1:
            assert torch.equal(*blocks), name
        elif name not in ("model.embed_tokens.weight", "lm_head.weight"):
            worst = max(worst, float(((blocks[0] - blocks[1]).abs() / largest).max()))
        elif gguf_type.startswith(("q4", "q5")):  # these have more bits
            assert ((blocks[0] - blocks[1]).abs() / largest).max() <= ERROR["q8_0"]
    assert ERROR[gguf_type] / 2 < worst <= ERROR[gguf_type]


def test_a_row_that_is_no_whole_block_is_kept_in_f16(tiny_model, tmp_path):
    folder = make("phi3", tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(
        AutoModelForCausalLM.from_pretrained(folder).config.__class__(**config | {"intermediate_size": 80})
    )
    model.save_pretrained(folder)
    path = write(folder, tmp_path / "out", "q8_0").path
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_tensors_may_come_in_any_order(tiny_model, tmp_path):
    folder = make("mixtral", tiny_model, tmp_path / "model")
    expected = write(folder, tmp_path / "one").path.read_bytes()
    (tmp_path / "other").mkdir()
    writer = GgufWriter(tmp_path / "other", facts_of(folder), "f32")
    for name, tensor in reversed(tensors(folder).items()):
        writer.write(name, tensor)
    writer.finish()
    assert writer.path.read_bytes() == expected


# ------------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize(
    ("family", "kind"), [("Llama", "llama"), ("Gemma", "llama"), ("Qwen2", "gpt2"), ("GPT2", "gpt2")]
)
def test_the_tokenizer_that_transformers_makes_of_the_file_reads_text_alike(family, kind, tiny_model, rows, tmp_path):
    name = {"Llama": "llama", "Gemma": "gemma2", "Qwen2": "qwen2", "GPT2": "gpt2"}[family]
    folder = make(name, tiny_model, tmp_path / "model")
    path = write(folder, tmp_path / "out").path
    said = metadata(path)
    assert said["tokenizer.ggml.model"] == kind
    mine = AutoTokenizer.from_pretrained(folder)
    assert said["tokenizer.ggml.tokens"][: len(mine)] == [
        text for text, _ in sorted(mine.get_vocab().items(), key=lambda entry: entry[1])
    ]
    if family != "Gemma":  # whose reader puts a space before a text
        theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        for row in rows[:20]:
            text = row.question.text
            assert (
                theirs(text, add_special_tokens=False)["input_ids"] == mine(text, add_special_tokens=False)["input_ids"]
            )


def test_special_and_stop_ids_are_those_of_training(tiny_model, tmp_path):
    folder = make("qwen2", tiny_model, tmp_path / "model")
    facts = facts_of(folder)
    writer = GgufWriter(tmp_path, facts.__class__(**vars(facts) | {"stop_ids": [0, 1, 7]}))
    writer.finish()
    said = metadata(writer.path)
    eos = facts.tokenizer.eos_token_id
    others = [number for number in (0, 1, 7) if number != eos]
    keys = ("eos", "eot", "eom")
    assert [said[f"tokenizer.ggml.{key}_token_id"] for key in keys] == [eos, *others]
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert said["tokenizer.ggml.pre"] == "qwen2"


def test_scores_merge_in_the_order_of_merges_where_there_is_no_sentencepiece_model(tiny_model, tmp_path):
    """llama.cpp's own converter gives every token the same score there, so that text is cut otherwise."""
    folder = make("llama", tiny_model, tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    said = metadata(write(folder, tmp_path / "out").path)
    scores = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"], strict=True))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    made = ["".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    assert len(made) > 50
    order = [scores[text] for text in dict.fromkeys(made)]
    assert order == sorted(order, reverse=True)
    assert len(set(order)) == len(order)


def test_the_chat_template_goes_into_the_file_and_its_prompt_beside_it(tiny_model, tmp_path):
    folder = make("qwen2", tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    path = write(folder, tmp_path / "out").path
    assert metadata(path)["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    assert (path.parent / "Modelfile").read_text().startswith(f"FROM ./{path.name}\n")
    assert 'PARAMETER stop "<|im_end|>"' in (path.parent / "Modelfile").read_text()


def test_the_chat_template_leaves_the_space_before_a_text_to_llama_cpp(tiny_model, tmp_path):
    """Transformers puts none behind the token that begins a text, so the template for it writes one."""
    folder = make("llama", tiny_model, tmp_path / "model")
    facts = facts_of(folder)
    (folder / "chat_template.jinja").write_text(outgoing(facts.tokenizer, facts.template)[0])
    assert "{{- ' ' -}}" in (folder / "chat_template.jinja").read_text()
    writer = write(folder, tmp_path / "out")
    assert "{{- ' ' -}}" not in metadata(writer.path)["tokenizer.chat_template"]
    assert writer.notes == []
    (told,) = GgufWriter(tmp_path, facts_of(folder, "vicuna")).notes
    assert told.endswith("it reads a prompt of 2 turns otherwise than training did")


def test_metadata_of_the_shape(tiny_model, tmp_path):
    said = metadata(write(make("llama tied, with biases, Llama 3's rope", tiny_model, tmp_path / "m"), tmp_path).path)
    expected = {
        "general.architecture": "llama", "general.type": "model", "llama.block_count": 2, "llama.context_length": 512,
        "llama.embedding_length": 64, "llama.feed_forward_length": 128, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 500000.0, "llama.rope.dimension_count": 16,
        "general.file_type": 0, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    assert {key: said[key] for key in expected} == expected


# --------------------------------------------------------------------------------------------------------- refusals


def refusal(folder, gguf_type="f16"):
    with pytest.raises((ModelError, ConfigError)) as caught:
        GgufWriter(folder, facts_of(folder), gguf_type)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_architecture_is_told_the_way_on(tiny_model):
    said = refusal(tiny_model("GPTNeoX"))
    assert "and this is gpt_neox; export with --format hf, and convert that with llama.cpp: python" in said


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaled by dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "its attention is scaled by 144"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "not every 6th of its layers"),
        ("qwen3 moe", {"norm_topk_prob": False}, "its experts are not weighted to 1"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "its attention is scaled by layer"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, changes, reason, tiny_model, tmp_path):
    folder = with_config(make(name, tiny_model, tmp_path / "model"), tmp_path / "changed", **changes)
    assert reason in refusal(folder)


def test_a_window_that_llama_cpp_leaves_out_is_told(tiny_model, tmp_path):
    folder = with_config(make("mistral", tiny_model, tmp_path / "model"), tmp_path / "changed", sliding_window=64)
    assert GgufWriter(tmp_path, facts_of(folder)).notes == [
        "llama.cpp attends to all tokens, this model to the last 64: it answers longer texts otherwise"
    ]


def test_a_tensor_without_a_name_is_named(tiny_model):
    facts = facts_of(tiny_model("Qwen2"))
    infos = facts.infos | {"model.layers.0.extra.weight": facts.infos["model.norm.weight"]}
    with pytest.raises(ModelError, match=r"no name for model\.layers\.0\.extra\.weight of a qwen2"):
        GgufWriter(facts.companions, facts.__class__(**vars(facts) | {"infos": infos}))


def test_a_tokenizer_that_splits_in_an_unknown_way_is_refused(tiny_model, tmp_path):
    facts = facts_of(tiny_model("Qwen2"))
    backend = facts.tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), backend.pre_tokenizer])
    with pytest.raises(ModelError, match="has no name for how this tokenizer splits text"):
        GgufWriter(tmp_path, facts)


def test_values_that_f16_cannot_hold_are_named(tiny_model, tmp_path):
    writer = GgufWriter(tmp_path, facts_of(tiny_model("Qwen2")), "f16")
    weight = tensors(tiny_model("Qwen2"))["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ExportError, match=r"up_proj\.weight holds values that f16 cannot; write --gguf_type bf16"):
        writer.write("model.layers.0.mlp.up_proj.weight", weight * 1e6)


@pytest.mark.parametrize(("package", "call"), [("gguf", require_package), ("llama_cpp", None)])
def test_a_missing_package_is_named(package, call, tiny_model, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else found(name, *rest))
    if call:
        with pytest.raises(ConfigError, match=r'pip install "lora-alpaca\[gguf\]"'):
            call()
    else:
        assert "pip install llama-cpp-python; or export f16, and then llama-quantize" in refusal(
            tiny_model("Llama"), "q4_k_m"
        )
