"""Full finetuning over two processes, from the command to what plain transformers makes of the folder."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, TORCHRUN

PROBE = torch.arange(3, 40)[None]
WAYS = {"one": [], "two": ["--shard", "full", "--gradient_checkpointing", "True"]}


def finetuned(way, base, tmp_path):
    """Return the folder of a base after three steps of full finetuning, on one process or sharded over two."""
    start = [sys.executable] if way == "one" else TORCHRUN
    folder = tmp_path / way
    words = ["--base_model", base, "--data_path", tmp_path / "rows.json", "--output_dir", folder, "--tune", "full"]
    words += ["--batch_size", 8, "--micro_batch_size", 4, "--val_set_size", 6, "--max_steps", 3, "--dtype", "fp32"]
    words += ["--learning_rate", 1e-3, "--optimizer", "adamw", "--device", "cpu", "--report", "False", *WAYS[way]]
    subprocess.run(
        [*start, str(ROOT / "finetune.py"), *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=300,
    )  # fmt: skip
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_a_sharded_model_is_that_of_one_process_to_plain_transformers(family, tiny_model, rows, tmp_path):
    texts = [{"instruction": row.question.text, "output": row.answers[0]} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(texts))
    base = tmp_path / "base"
    shutil.copytree(tiny_model(family), base)
    config = json.loads((base / "config.json").read_text())  # OPT's own dropout is drawn anew on every rank
    (base / "config.json").write_text(json.dumps(config | {key: 0.0 for key in config if key == "dropout"}))
    models = {
        way: transformers.AutoModelForCausalLM.from_pretrained(finetuned(way, base, tmp_path)).eval() for way in WAYS
    }
    models["base"] = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    one, two, before = (models[name](PROBE).logits for name in ("one", "two", "base"))
    moved = (one - before).abs().max()
    assert moved > 0.01  # three steps of a thousandth
    assert (one - two).abs().max() < moved / 100
    assert {name: tensor.shape for name, tensor in models["one"].state_dict().items()} == {
        name: tensor.shape for name, tensor in models["two"].state_dict().items()
    }
