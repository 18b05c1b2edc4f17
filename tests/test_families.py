"""One tiny random model of each family trains in the default precision, resumes, exports and generates."""

import pytest
import torch
from command import run
from short_run import flags, interrupt, same

from lora_alpaca.artifacts.adapter_folder import read_weights
from lora_alpaca.storage import output_folder

FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "OPT", "GPT2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tiny_model, data_path, tmp_path):
    options = {
        "base_model": tiny_model(family), "data_path": data_path, "output_dir": tmp_path / "adapter", "batch_size": 4,
        "max_steps": 6, "save_steps": 3, "val_set_size": 4, "learning_rate": 1e-2, "cutoff_len": 96,
    }  # fmt: skip
    result = run("finetune", *flags(options))
    assert result.code == 0, result.err
    assert "8-bit (LLM.int8) base" in result.out
    state = read_weights(tmp_path / "adapter")
    assert all(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)

    run("finetune", *flags(options | {"output_dir": tmp_path / "killed"}))
    interrupt(tmp_path / "killed", last_checkpoint=3)
    assert run("finetune", *flags(options | {"output_dir": tmp_path / "killed"}), "--resume").code == 0
    assert same(tmp_path / "adapter", tmp_path / "killed")

    result = run("export", "--lora_weights", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert result.code == 0, result.err
    receipt = output_folder.read_record(tmp_path / "merged")["receipt"]
    assert receipt["merge_error"] < 1e-4
    assert receipt["changed_weights"] > 0
    ask = ["--instruction", "Hello.", "--max_new_tokens", "4", "--temperature", "0", "--dtype", "fp32"]
    answers = [
        run("generate", "--lora_weights", tmp_path / "adapter", *ask),
        run("generate", "--base_model", tmp_path / "merged", "--lora_weights", "none", *ask),
    ]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert answers[0].out == answers[1].out
    assert run("generate", "--lora_weights", tmp_path / "adapter", *ask, "--load_8bit").code == 0
    torch.manual_seed(0)
