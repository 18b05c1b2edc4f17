"""The final save of a model that is spread over ranks: its memory is that of tensors, and not of the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TORCHRUN, as_row

PROGRAMME = Path(__file__).with_name("final_save_ranks.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux alone")
def test_the_final_save_does_not_run_out_of_memory(rows, tiny_llama, tmp_path):
    """The rank that saves may take two tensors more than it has, and what waits to be hashed, and saves."""
    base, out = tmp_path / "base", tmp_path / "out"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=18, num_attention_heads=8,
        bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([as_row(row) for row in rows[:4]]))
    flags = {
        "base_model": base, "data_path": data, "output_dir": out, "tune": "full", "shard": "full", "max_steps": 1,
        "batch_size": 2, "val_set_size": 0, "engine": "padded", "dtype": "fp32", "prompt_template_name": "alpaca_short",
        "device": "cpu", "learning_rate": 1e-3,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [*TORCHRUN, str(PROGRAMME), *words], capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:4000]
    allowed, whole = map(int, done.stdout.split("allowed: ")[1].split()[:2])
    assert allowed < 0.6 * whole  # so that a rank that gathers all of it fails
    saved = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert saved.keys() == before.keys()
    assert any(not torch.equal(saved[name], before[name]) for name in saved)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
