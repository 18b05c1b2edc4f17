"""What the tests of clients share: models after a short run, exported, and what our generator answers from them."""

import json

import torch
from command import run
from conftest import as_row
from short_run import flags

from lora_alpaca.config import GenerateConfig
from lora_alpaca.inference.generator import Generator

NEW = 32  # tokens of an answer


def finetuned(base, rows, folder, **options):
    """Finetune a base on rows and return the adapter's folder."""
    data = folder / "rows.json"
    data.write_text(json.dumps([as_row(row) for row in rows]), encoding="utf-8")
    settings = {
        "base_model": base, "data_path": data, "output_dir": folder / "adapter", "batch_size": 8, "val_set_size": 0,
        "cutoff_len": 128, "load_8bit": "false", "dtype": "fp32", "seed": 1,
    }  # fmt: skip
    done = run("finetune", *flags(settings | options))
    assert done.code == 0, done.err
    return folder / "adapter"


def exported(adapter, folder, *words):
    done = run(
        "export", "--lora_weights", adapter, "--output_dir", folder, "--dtype", "fp32", "--receipt", "false", *words
    )
    assert done.code == 0, done.err
    return folder


def generator(adapter):
    return Generator.load(GenerateConfig(lora_weights=str(adapter), dtype="fp32", temperature=0, max_new_tokens=NEW))


@torch.no_grad()
def greedy(ours, ids):
    """Return the answer of our generator, the first logits, and the logits of each step."""
    found, made = [], []
    sequence = torch.tensor([ids])
    state = ours.model(sequence, use_cache=True)
    while True:
        found.append(state.logits[0, -1])
        token = int(found[-1].argmax())
        if token in ours.stop_ids or len(made) == NEW:
            return made, found
        made.append(token)
        state = ours.model(torch.tensor([[token]]), past_key_values=state.past_key_values, use_cache=True)
