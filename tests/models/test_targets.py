"""Target modules: names, full names and regular expressions; what matches nothing, or cannot learn, is named."""

import json
import re
import time

import pytest
import torch
import transformers
from command import error_line, run
from conftest import ARCHITECTURES
from peft import LoraConfig

from lora_alpaca.artifacts.adapter_folder import read_weights
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import ModelError
from lora_alpaca.models import lora, targets
from lora_alpaca.models.base import Base

SLOW = "(.*.*)*(.*.*)*(.*.*)*x_proj"  # takes years


def model(architecture="Llama", **changes):
    with torch.device("meta"):
        config = getattr(transformers, f"{architecture}Config")(**ARCHITECTURES[architecture] | changes)
        return transformers.AutoModelForCausalLM.from_config(config)


def adapted(asked, **changes):
    """Return the modules that get an adapter, and what PEFT writes down of them."""
    base = model(**changes)
    with torch.device("meta"):
        found = lora.attach(base, FinetuneConfig(lora_target_modules=asked), Base("", "", None, False, base.config))
    return sorted(lora.lora_layers(found)), lora.peft_config(found)["target_modules"]


Q, V = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"


@pytest.mark.parametrize(
    ("asked", "names", "written"),
    [
        ("q_proj,v_proj", [Q.format(0), V.format(0), Q.format(1), V.format(1)], ["q_proj", "v_proj"]),
        ("self_attn.q_proj", [Q.format(0), Q.format(1)], ["self_attn.q_proj"]),
        ("layers.0.self_attn.q_proj", [Q.format(0)], ["layers.0.self_attn.q_proj"]),
        (Q.format(1), [Q.format(1)], [Q.format(1)]),
        (r".*\.layers\.1\..*(q_proj|v_proj)", [Q.format(1), V.format(1)], r".*\.layers\.1\..*(q_proj|v_proj)"),
        (r".*\.q_proj,1.self_attn.v_proj", [Q.format(0), Q.format(1), V.format(1)], None),
        (r".*[0],v_proj,.*q_proj", None, None),  # matches a layer
    ],
)
def test_what_gets_an_adapter(asked, names, written):
    if names is None:
        with pytest.raises(ModelError, match=r"model\.layers\.0 is a module of class LlamaDecoderLayer"):
            adapted(asked)
        return
    found, config = adapted(asked)
    assert found == sorted(names)
    if written is not None:
        assert config == written
    if isinstance(config, str):
        assert [name for name, _ in model().named_modules() if re.fullmatch(config, name)] == names


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("q_proj,nothing.v_proj", "nothing.v_proj: the model has no such module; it has down_proj, gate_proj, k_proj, "
         "o_proj, q_proj, up_proj, v_proj; nearest to nothing.v_proj: model.layers."),
        ("vproj", "v_proj; nearest to vproj: v_proj"),
        ("model.layers.7.self_attn.q_proj", "nearest to model.layers.7.self_attn.q_proj: model.layers."),
        (r".*\.layers\.7\..*q_proj,v_proj", r".*\.layers\.7\..*q_proj: the model has no such module"),
        (r"q_proj(", r"q_proj( is no regular expression: missing ), unterminated subpattern"),
        ("lm_head", "--lora_target_modules lm_head: lm_head is the model's head, and left out on purpose: the loss is "
         "computed through it as it is; the layers are down_proj"),
        ("q_proj,.*(v_proj|lm_head)", ".*(v_proj|lm_head): lm_head is the model's head"),
        ("embed_tokens", "embed_tokens: model.embed_tokens is a module of class Embedding, and an adapter is put"),
        ("q_proj,self_attn", "self_attn: model.layers.0.self_attn is a module of class LlamaAttention"),
        ("a*" * 1500, "has 3000 characters, and 2000 are allowed"),
    ],
)  # fmt: skip
def test_what_gets_none_is_named(asked, said):
    with pytest.raises(ModelError, match=re.escape(said)) as error:
        adapted(asked)
    assert "\n" not in str(error.value)


def test_a_head_that_is_the_embedding_says_so():
    with pytest.raises(ModelError, match="as it is, and its weights are the embedding's too"):
        adapted("lm_head", tie_word_embeddings=True)


def test_an_expression_that_takes_years_takes_seconds(monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 1.0)
    begun = time.perf_counter()
    with pytest.raises(ModelError, match=r"takes longer than 1 seconds"):
        adapted(SLOW)
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize(
    "strange",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {SLOW: 4}},
        {"modules_to_save": [SLOW]},
        {"layers_to_transform": [0], "layers_pattern": [SLOW]},
    ],
)
def test_the_expressions_of_a_strangers_adapter_have_a_limit(strange, monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 1.0)
    with pytest.raises(ValueError, match="takes longer than 1 seconds"):
        lora.with_lora(model(), LoraConfig(**{"target_modules": ["q_proj"]} | strange))


def test_names_start_no_process(monkeypatch):
    monkeypatch.setattr(targets.subprocess, "run", None)
    assert len(adapted("q_proj,layers.0.self_attn.v_proj")[0]) == 3


def test_an_expression_trains_exports_and_answers(tiny_llama, data_path, tmp_path):
    expression = r".*\.layers\.1\..*(q_proj|v_proj)"
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    words = ["--base_model", tiny_llama, "--data_path", data_path, "--output_dir", adapter, "--max_steps", 2]
    words += ["--batch_size", 4, "--val_set_size", 0, "--learning_rate", 1e-2, "--lora_target_modules", expression]
    assert run("finetune", *words).code == 0
    assert json.loads((adapter / "adapter_config.json").read_text())["target_modules"] == expression
    layers = {name.partition(".self_attn")[0].rpartition(".")[2] for name in read_weights(adapter)}
    assert layers == {"1"}
    again = run("finetune", *words[:4], "--output_dir", tmp_path / "more", *words[6:], "--init_adapter", adapter)
    assert again.code == 0, again.err
    assert run("export", "--lora_weights", adapter, "--output_dir", merged).code == 0
    ask = ["--instruction", "Hello.", "--max_new_tokens", 6, "--temperature", 0, "--dtype", "fp32"]
    answers = [
        run("generate", "--lora_weights", adapter, *ask),
        run("generate", "--base_model", merged, "--lora_weights", "none", *ask),
    ]
    assert answers[0].code == 0
    assert answers[0].out == answers[1].out


@pytest.mark.parametrize("verb", ["generate", "export", "finetune"])
def test_a_strangers_expression_ends_a_command_in_seconds(verb, tiny_llama, data_path, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "SECONDS", 1.0)
    with torch.random.fork_rng():
        stranger = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
        lora.with_lora(stranger, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
            tmp_path
        )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": SLOW}))
    words = {
        "generate": ["--lora_weights", tmp_path, "--prompt_template", "alpaca", "--instruction", "Hello."],
        "export": ["--lora_weights", tmp_path, "--prompt_template", "alpaca", "--output_dir", tmp_path / "merged"],
        "finetune": ["--init_adapter", tmp_path, "--data_path", data_path, "--output_dir", tmp_path / "out"],
    }
    begun = time.perf_counter()
    line = error_line(run(verb, "--base_model", tiny_llama, *words[verb]), 1)
    assert "takes longer than 1 seconds" in line
    assert time.perf_counter() - begun < 30
