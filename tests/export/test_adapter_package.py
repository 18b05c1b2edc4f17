"""An adapter by itself: PEFT loads it, its card is true, and nothing in it is the user's own or is of the run alone."""

import json
import shutil

import peft
import pytest
import short_run
import torch
import transformers
import yaml
from command import run

from lora_alpaca.artifacts.prompt_contract import GOLDEN
from lora_alpaca.artifacts.source import open_adapter
from lora_alpaca.errors import AdapterError
from lora_alpaca.export.writers import model_card
from lora_alpaca.export.writers.adapter_package import vllm_limits, write_adapter
from lora_alpaca.models.base import locate_base
from lora_alpaca.prompts import load_template

WRITTEN = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "lora_alpaca.json",
    "prompt_contract.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tiny_llama, rows, tmp_path_factory):
    """Return the folder of an adapter trained for a few steps, with a checkpoint and a file of the user's."""
    found = short_run.adapter(tmp_path_factory.mktemp("package"), tiny_llama, rows, save_steps=4)
    (found / "diary.txt").write_text("mine")
    return found


def package(adapter, to, **options):
    source = open_adapter(adapter, **options)
    tokenizer, template, _ = source.load_tokenizer()
    to.mkdir()
    return write_adapter(to, source, tokenizer, template, "me/animals", {"largest logit difference": 1.5e-6})


def test_peft_loads_it(adapter, tiny_llama, tmp_path):
    assert package(adapter, tmp_path / "out") == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN
    ids = torch.arange(40)[None]

    def logits(folder):
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
        with torch.no_grad():
            return peft.PeftModel.from_pretrained(base, folder).eval()(input_ids=ids).logits

    assert torch.equal(logits(tmp_path / "out"), logits(adapter))
    result = run(
        "generate", "--base_model", tiny_llama, "--lora_weights", tmp_path / "out", "--instruction", "Describe the owl."
    )
    assert result.code == 0, result.err
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Describe the owl."}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith(load_template("alpaca").prompt_no_input.format(instruction="Describe the owl."))


def test_nothing_private_is_in_it(adapter, rows, tmp_path):
    package(adapter, tmp_path / "out")
    secrets = [str(adapter.parent), "lora_alpaca.private", "diary", "checkpoint-"]
    texts = {row.question.text for row in rows} | {answer for row in rows for answer in row.answers if len(answer) > 12}
    texts -= {conversation.question.text for conversation in GOLDEN}
    for path in (tmp_path / "out").iterdir():
        if path.name.startswith("tokenizer"):  # trained on these rows, here
            continue
        content = path.read_bytes().decode(errors="replace")
        assert not [secret for secret in secrets if secret in content], path
        assert not [text for text in texts if text in content], path


def test_the_card_is_what_the_hub_reads(adapter, tmp_path):
    package(adapter, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "instruction-tuning", "text-generation"],
    }, "a base that is a folder is not on the hub, and of a licence nothing is known"
    record = json.loads((adapter / "lora_alpaca.json").read_text())
    for row in (
        f"| examples | {record['ledger']['train']} |",
        f"| tokens to learn | {record['ledger']['learned']:,} |",
        f"| validation loss | {record['result']['validation_loss']:.4g} |",
        "| learning_rate | 0.02 |",
        "| r | 8 |",
        "| target_modules | q_proj, v_proj |",
        "| largest logit difference | 1.5e-06 |",
        "Write a response that appropriately completes the request.",
    ):
        assert row in body
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_card_of_a_base_on_the_hub(kind, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "base")
    (folder / "README.md").write_text(
        "---\nlicense: llama3.1\nlicense_link: https://a.org/b\nlanguage:\n- en\n---\n# B\n"
    )
    settings = {"base_model_name_or_path": "meta-llama/Llama-3.1-8B", "r": 8}
    record = {
        "options": {"data_path": "tatsu-lab/alpaca"},
        "ledger": "damaged",
        "versions": 3,
        "result": {"steps": "|x"},
    }
    template = load_template("alpaca")
    text = model_card.card(kind, "me/model", locate_base(str(folder)), record, settings, template)
    front = yaml.safe_load(text.split("---\n", 2)[1])
    relation = "adapter" if kind == "adapter" else "finetune"
    assert front == {
        "base_model": "meta-llama/Llama-3.1-8B",
        "base_model_relation": relation,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "instruction-tuning", "text-generation", f"base_model:{relation}:meta-llama/Llama-3.1-8B"],
        "datasets": ["tatsu-lab/alpaca"],
        "license": "llama3.1",
        "license_link": "https://a.org/b",
    }
    served = {
        "adapter": "vllm serve meta-llama/Llama-3.1-8B --enable-lora --lora-modules",
        "merged": "vllm serve me/model",
    }
    assert served[kind] in text


def test_an_adapter_of_others(adapter, tiny_llama, tmp_path):
    """Its base is named by a path of this machine, and nothing is recorded; the package can be opened by us."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, foreign)
    settings = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(tiny_llama)}))
    notes = package(foreign, tmp_path / "out", template="alpaca")
    assert notes == [f"adapter_config.json names the base {tiny_llama.name}, and not its path {tiny_llama}"]
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written == settings | {"base_model_name_or_path": tiny_llama.name}
    found = open_adapter(tmp_path / "out", str(tiny_llama), template="alpaca")
    found.verify()
    (foreign / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(AdapterError, match="cannot be read"):
        package(foreign, tmp_path / "other", template="alpaca")


KINDS = {  # of adapters, and what vLLM does with them
    "plain": ({}, []),
    "rank 17": ({"r": 17}, ["vLLM needs --max-lora-rank 32: the rank is 17"]),
    "rank 600": ({"r": 600}, ["vLLM cannot load a rank of 600, over 512; merge it: --format hf"]),
    "a rank for a layer": (
        {"rank_pattern": {"q_proj": 64}},
        [
            "vLLM needs --max-lora-rank 64: the rank is 64",
            "vLLM cannot heed rank_pattern, and scales every layer alike; merge it: --format hf",
        ],
    ),
    "DoRA": ({"use_dora": True}, ["vLLM cannot load DoRA; merge it: --format hf"]),
    "the head": (
        {"modules_to_save": ["lm_head"]},
        ["vLLM cannot load modules_to_save; merge it: --format hf"],
    ),
    "biases": ({"bias": "lora_only"}, ["vLLM cannot load trained biases; merge it: --format hf"]),
    "tokens": (
        {"trainable_token_indices": [1, 2]},
        ["vLLM cannot load trainable_token_indices; merge it: --format hf"],
    ),
    "embeddings": (
        {"target_modules": ["q_proj", "embed_tokens"]},
        ["vLLM loads LoRA on embed_tokens for some architectures only; else merge it: --format hf"],
    ),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", KINDS)
def test_what_vllm_does_not_load(kind, tiny_llama, tmp_path):
    options, expected = KINDS[kind]
    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False} | options
    )
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(tmp_path)
    notes = package(tmp_path, tmp_path / "out", template="alpaca")
    assert notes[:-1] == expected  # the last one is on the path of the base
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(f"- {line}" in text for line in expected)
    assert ("vllm serve" in text) == (not any("vLLM cannot" in line for line in expected))
    assert ("--max-lora-rank" in text) == ("rank" in kind and "600" not in kind)


def test_vllm_and_more_tokens_or_another_kind():
    plain = {"peft_type": "LORA", "r": 8}
    state = {"base_model.model.model.embed_tokens.weight": torch.ones(11, 2)}
    assert vllm_limits(plain, state, 11) == []
    assert "tokens that were added" in vllm_limits(plain, state, 10)[0]
    assert vllm_limits({"peft_type": "IA3"}, {}, 1) == [
        "vLLM cannot load an adapter of kind IA3; merge it: --format hf"
    ]
