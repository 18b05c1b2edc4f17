"""--lora_target_parameters: an adapter on the experts of a mixture, one 3-D tensor each, trained, asked and merged."""

import json
import shutil

import pytest
import transformers
from command import refused, run
from conftest import LLAMA_SIZES
from safetensors.torch import load_file

EXPERTS = "experts.gate_up_proj,experts.down_proj"
SIZES = ["--max_steps", "2", "--batch_size", "4", "--val_set_size", "4", "--cutoff_len", "96", "--report", "False"]


@pytest.fixture
def words(tiny_llama, data_path, tmp_path, monkeypatch):
    """Return the words of a short run on a random mixture of four experts, with the tokenizer of the tiny Llama."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BASE_MODEL", raising=False)
    base = tmp_path / "mixture"
    shutil.copytree(tiny_llama, base)
    sizes = LLAMA_SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
    ids = {"vocab_size": transformers.AutoConfig.from_pretrained(base).vocab_size, "bos_token_id": 1, "eos_token_id": 2}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **ids)).save_pretrained(base)
    return ["--base_model", base, "--data_path", data_path, *SIZES, "--dtype", "fp32", "--load_8bit", "False"]


@pytest.mark.slow
def test_experts_learn_answer_and_are_merged(words, tmp_path):
    trained = run("finetune", *words, "--lora_target_parameters", EXPERTS, "--learning_rate", "1e-2")
    assert trained.code == 0, trained.err
    folder = tmp_path / "lora-alpaca"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(settings["target_parameters"]) == sorted(EXPERTS.split(","))
    assert settings["lora_dropout"] == 0
    tensors = load_file(folder / "adapter_model.safetensors")
    of_experts = [name for name in tensors if "experts" in name and "lora_B" in name]
    assert len(of_experts) == 4, "two stacks in each of two layers"
    assert all(tensors[name].any() for name in of_experts), "they did not learn"

    asked = ["--base_model", words[1], "--dtype", "fp32", "--instruction", "Hello.", "--max_new_tokens", "4"]
    by_adapter = run("generate", *asked, "--temperature", "0")
    assert by_adapter.code == 0, by_adapter.err
    exported = run("export", "--base_model", words[1], "--output_dir", "out", "--dtype", "fp32")
    assert exported.code == 0, exported.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["experts.up_proj"], "it has experts.down_proj, experts.gate_up_proj"),
        (["q_proj.weight"], "the model has no such stack of matrices"),
    ],
)
def test_parameters_that_are_not_there(words, more, said):
    result = run("finetune", *words, "--lora_target_parameters", *more)
    assert result.code == 1
    assert said in result.err


@pytest.mark.parametrize(
    "more",
    [["--use_dora"], ["--lora_dropout", "0.1"], ["--layers", "top:1"], ["--init_adapter", "x"], ["--shard", "full"]],
)
def test_what_an_adapter_on_parameters_excludes(more):
    line = refused("finetune", "--lora_target_parameters", EXPERTS, *more)
    assert f"--lora_target_parameters excludes {more[0]}" in line
