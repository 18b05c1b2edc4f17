"""mlx-lm, on its CPU backend, loads our `hf` folder: logits of transformers, and greedy answers of our generator."""

import json

import gguf_files
import numpy as np
import pytest
import torch
from environments import answer, environment
from short_models import NEW, exported, finetuned, generator, greedy

pytestmark = pytest.mark.clients

LOGITS = """
import json, sys
import mlx.core as mx, numpy as np
from mlx_lm import load
given = json.load(sys.stdin)
model, _ = load(given["model"])
ids = json.load(open(given["ids"]))
np.save(given["logits"], np.array(model(mx.array([ids]))[0].astype(mx.float32)))
print(json.dumps({}))
"""
ANSWER = """
import json, sys
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
given = json.load(sys.stdin)
model, tokenizer = load(given["model"])
found = []
for messages in given["chats"]:
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    made = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=given["new"]):
        if int(token) in tokenizer.eos_token_ids:
            break
        made.append(int(token))
    found.append({"ids": list(prompt), "made": made})
print(json.dumps(found))
"""
SAME = [  # not Gemma 2, of which mlx-lm lets every layer see all tokens
    "llama", "llama tied, with biases, Llama 3's rope", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "phi3",
]  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_mlx_computes_what_transformers_does(name, tiny_model, tmp_path, record_property):
    environment("mlx")
    folder = gguf_files.make(name, tiny_model, tmp_path / "model")
    path = folder / "config.json"  # which an export writes in old words, too: mlx-lm reads no others
    content = json.loads(path.read_text())
    rope = dict(content["rope_parameters"])
    scaling = rope if rope["rope_type"] != "default" else None
    path.write_text(json.dumps(content | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}))
    expected, found = gguf_files.logits(folder, tmp_path / "ids.json"), tmp_path / "logits.npy"
    answer("mlx", LOGITS, {"model": folder, "ids": tmp_path / "ids.json", "logits": found})
    difference = float((torch.from_numpy(np.load(found)) - expected).abs().max())
    record_property("largest difference of logits, and the largest logit", [difference, float(expected.abs().max())])
    assert difference < 1e-3 * float(expected.abs().max())


def test_the_demo_answers_as_ours(rows, tmp_path, record_property):
    environment("mlx")
    adapter = finetuned("demo", rows, tmp_path, max_steps=20, learning_rate=5e-3)
    folder = exported(adapter, tmp_path / "out", "--format", "hf")
    ours = generator(adapter)
    asked = [row for row in rows if not row.question.input][:20]
    chats = [[{"role": "user", "content": row.question.text}] for row in asked]
    theirs = answer("mlx", ANSWER, {"model": folder, "chats": chats, "new": NEW})
    ids = [ours.prompt_ids(row.question.text, "", ()) for row in asked]
    made = [greedy(ours, prompt)[0] for prompt in ids]
    record_property("prompts alike", sum(one["ids"] == other for one, other in zip(theirs, ids, strict=True)))
    record_property("answers equal", sum(one["made"] == other for one, other in zip(theirs, made, strict=True)))
    assert [one["ids"] for one in theirs] == ids
    assert [one["made"] for one in theirs] == made
