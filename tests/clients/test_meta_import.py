"""What import_meta writes, read by transformers 4: the same config, logits and tokens as the installed one reads."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from command import run
from environments import answer

sys.path.insert(0, str(Path(__file__).parent.parent / "export"))
from test_import_meta import TEXTS, as_llamas
from test_meta_checkpoint import MODELS, model, write

pytestmark = pytest.mark.clients
__all__ = ["model"]

READ = """
import json, sys, torch, transformers
given = json.load(sys.stdin)
model = transformers.AutoModelForCausalLM.from_pretrained(given["folder"], dtype=torch.float64)
tokenizer = transformers.AutoTokenizer.from_pretrained(given["folder"])
with torch.no_grad():
    logits = model(input_ids=torch.tensor([given["ids"]])).logits[0]
torch.save(logits, given["to"])
config = model.config
print(json.dumps({
    "version": transformers.__version__,
    "ids": [tokenizer(text).input_ids for text in given["texts"]],
    "rope": [config.rope_theta, config.rope_scaling],
    "dtype": str(transformers.AutoConfig.from_pretrained(given["folder"]).dtype),
}))
"""


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_4_reads_it(kind, model, tmp_path, record_property):
    folder = model(**MODELS[kind])
    as_llamas(folder / "tokenizer.model")
    write(folder, tmp_path / "meta")
    assert run("import_meta", tmp_path / "meta", tmp_path / "new").code == 0
    ids = list(range(3, 43))
    told = {"folder": tmp_path / "new", "ids": ids, "texts": TEXTS, "to": tmp_path / "logits.pt"}
    found = answer("transformers4", READ, told)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([ids])).logits[0]
    difference = (torch.load(tmp_path / "logits.pt") - logits).abs().max() / logits.abs().max()
    record_property("transformers", found["version"])
    record_property("largest difference of logits", float(difference))
    assert difference < 1e-6
    assert found["ids"] == [
        transformers.AutoTokenizer.from_pretrained(tmp_path / "new")(text).input_ids for text in TEXTS
    ]
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert found["rope"] == [config["rope_theta"], config["rope_scaling"]]
    assert found["dtype"] == f"torch.{config['torch_dtype']}"
