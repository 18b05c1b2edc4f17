"""transformers 4.57 reads what is written here, and answers as transformers 5 does: same ids, same logits.

It reads its own files otherwise than transformers 5 saves them: another class of tokenizer, `rope_theta` and
`rope_scaling`, `torch_dtype`. The base with LLaMA 3's rotary positions is made by transformers 4 itself.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import as_row
from environments import answer

from lora_alpaca import ExportConfig, FinetuneConfig, export_hf, finetune
from lora_alpaca.artifacts import companions
from lora_alpaca.artifacts.source import ModelSource
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import Conversation, load_template
from lora_alpaca.prompts.jinja import chat_messages

pytestmark = pytest.mark.clients

MAKES_A_BASE = """
import json, sys, torch, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
given = json.load(sys.stdin)
control = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
core = Tokenizer(models.BPE())
core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
core.decoder = decoders.ByteLevel()
core.train_from_iterator(given["texts"], trainers.BpeTrainer(
    vocab_size=600, special_tokens=control, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
core.post_processor = processors.TemplateProcessing(single=control[0] + " $A", special_tokens=[(control[0], 0)])
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=control[0], eos_token=control[1])
tokenizer.save_pretrained(given["folder"])
scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
           "rope_type": "llama3"}
config = transformers.LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, rope_theta=500000.0, rope_scaling=scaling, bos_token_id=0,
    eos_token_id=[1, 2], initializer_range=0.1, torch_dtype=torch.float32)
torch.manual_seed(0)
transformers.LlamaForCausalLM(config).save_pretrained(given["folder"])
print(json.dumps(transformers.__version__))
"""
READS = """
import json, sys, torch, transformers
given = json.load(sys.stdin)
found = {}
for folder in given["folders"]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found[folder] = one = {"class": type(tokenizer).__name__, "eos": tokenizer.eos_token_id, "ids": []}
    for messages in given["messages"]:
        one["ids"].append(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    if folder in given["models"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        one["stops"], one["dtype"] = model.generation_config.eos_token_id, str(model.dtype)
        with torch.inference_mode():
            one["logits"] = [model(torch.tensor([given["long"]])).logits[0, -8:].float().tolist()]
print(json.dumps(found))
"""
ROWS = [
    Conversation.of("Name the opposite.", "Word: hot"),
    Conversation.of(" Größe 你好 🦙\n\n  {input} 'it''s' \\n?", ""),
    Conversation.of("Describe the owl.", "\n a\n\nb "),
]
LONG = [7 + (13 * place) % 400 for place in range(300)]


def logits(folder: Path) -> torch.Tensor:
    """Return the logits of the last places of a long text, by this version of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(torch.tensor([LONG])).logits[0, -8:].float()


def read(models: list[Path], adapters: list[Path] = ()) -> dict[Path, Any]:  # type: ignore[assignment]
    """Return what transformers 4 reads in folders: ids of prompts, and logits of models."""
    messages = [chat_messages(load_template("alpaca"), row) for row in ROWS]
    given = {"folders": [*models, *adapters], "models": models, "messages": messages, "long": LONG}
    return {Path(folder): found for folder, found in answer("transformers4", READS, given).items()}


def wanted(tokenizer: Any) -> list[list[int]]:
    encoder = Encoder.for_prompts(tokenizer, load_template("alpaca").bound(tokenizer))
    return [encoder.prompt(row) for row in ROWS]


def test_a_base_of_transformers_4_is_trained_merged_and_read_by_it(rows, tmp_path, record_property):
    base, data = tmp_path / "base", tmp_path / "rows.json"
    data.write_text(json.dumps([as_row(row) for row in rows]))
    texts = [load_template("alpaca").prompt(row)[0].text for row in rows]
    version = answer("transformers4", MAKES_A_BASE, {"folder": base, "texts": texts})
    record_property("transformers", version)
    assert version.startswith("4.")
    config = FinetuneConfig(
        base_model=str(base), data_path=str(data), output_dir=str(tmp_path / "adapter"), batch_size=4, max_steps=4,
        val_set_size=0, learning_rate=2e-2, cutoff_len=256, load_8bit=False, dtype="fp32", device="cpu",
    )  # fmt: skip
    adapter = finetune(config).output_dir
    merged = export_hf(ExportConfig(lora_weights=str(adapter), output_dir=str(tmp_path / "merged")))
    found = read([merged], [adapter])
    tokenizer, _ = load_tokenizer(locate_base(str(base)))
    for one in found.values():
        assert one["ids"] == wanted(tokenizer)
        assert (one["class"], one["eos"]) == ("PreTrainedTokenizerFast", 1)
    assert (found[merged]["stops"], found[merged]["dtype"]) == ([1, 2], "torch.float32")
    ours = logits(merged)
    difference = (torch.tensor(found[merged]["logits"][0]) - ours).abs().max().item()
    record_property("largest difference of logits", difference)
    assert difference < 1e-4 * ours.abs().max().item()
    assert (ours - logits(base)).abs().max() > 1e-2
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, merged))
    assert before["rope_scaling"]["rope_type"] == "llama3"
    assert after == before | {"torch_dtype": "float32"}  # 4.57 calls it dtype already


@pytest.mark.parametrize(
    "architecture", ["Llama", "Gemma", "Qwen2", "Qwen3", "GPTNeoX", "GPT2", "OPT", "Mistral", "Bloom"]
)
def test_a_base_of_transformers_5_goes_out_as_4_reads_it(architecture, tiny_model, tmp_path, record_property):
    folder, out = tiny_model(architecture), tmp_path / "out"
    base = locate_base(str(folder))
    tokenizer, _ = load_tokenizer(base)
    template = load_template("alpaca").bound(tokenizer)
    source = ModelSource(base, None, None, template, [])
    out.mkdir()
    ends = [tokenizer.eos_token_id]
    tied = bool(base.config.tie_word_embeddings)
    companions.write(out, source, tokenizer, template, ends, torch.float32, tied)
    for path in folder.glob("*.safetensors"):
        shutil.copy(path, out)
    found = read([out])[out]
    assert found["ids"] == wanted(tokenizer)
    ours = logits(folder)
    difference = (torch.tensor(found["logits"][0]) - ours).abs().max().item()
    record_property("class", found["class"])
    record_property("largest difference of logits", difference)
    assert difference < 1e-4 * ours.abs().max().item()
