"""What we write as GGUF is what llama.cpp's own converters make of the same folders, bit for bit."""

import subprocess
import warnings

import gguf
import gguf_files
import pytest
import torch
from environments import environment, llama_cpp_source, own_environment
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_alpaca.export.writers.gguf.lora import write_gguf_lora
from lora_alpaca.models.base import locate_base

pytestmark = pytest.mark.clients

# llama.cpp's converter, which knows no vocabulary that a test made: those are told how they split text
CONVERT = """
import runpy, sys
source, split = sys.argv[1:3]
sys.path[:0] = [source, f"{source}/gguf-py"]
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def named(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return split
TextModel.get_vocab_base_pre = named
sys.argv = sys.argv[3:]
runpy.run_path(f"{source}/{sys.argv[0]}", run_name="__main__")
"""
# what llama.cpp makes of the names of folders, or of a card, and that nothing but a list of models shows
OF_NAMES = ("general.name", "general.basename", "general.finetune", "general.size_label", "general.version",
            "general.base_model", "general.tags")  # fmt: skip


def convert(script, *words, split="gpt-2"):
    """Run a converter of llama.cpp."""
    source = llama_cpp_source()
    done = subprocess.run(
        [str(environment("convert")), "-c", CONVERT, str(source), split, script, *map(str, words)],
        capture_output=True,
        text=True,
        env=own_environment(),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def tensors(path):
    return {
        tensor.name: (tensor.tensor_type.name, tuple(tensor.shape.tolist()), tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def differences(ours, theirs):
    """Return key -> ours and theirs, of the metadata that is not the same."""
    one, other = gguf_files.metadata(ours), gguf_files.metadata(theirs)
    found = {}
    for key in sorted(one.keys() | other.keys()):
        mine, its = one.get(key), other.get(key)
        if mine != its and isinstance(mine, list) and isinstance(its, list) and len(mine) == len(its):
            places = [n for n in range(len(mine)) if mine[n] != its[n]]
            found[key] = f"differs at {len(places)} of {len(mine)} places: " + ", ".join(
                f"{n} {mine[n]!r} {its[n]!r}" for n in places[:4]
            )
        elif mine != its:
            found[key] = f"{str(mine)[:80]} | {str(its)[:80]}"
    return found


@pytest.mark.parametrize(
    ("name", "gguf_type"),
    [
        *((name, "f32") for name in gguf_files.MODELS),
        *((name, kind) for name in ("llama", "mixtral", "gemma2", "gpt2") for kind in ("bf16", "f16", "q8_0")),
    ],
)
def test_a_model_is_what_llama_cpp_makes_of_it(name, gguf_type, tiny_model, tmp_path, record_property):
    environment("convert")
    folder = gguf_files.make(name, tiny_model, tmp_path / "model", "float32" if gguf_type == "f32" else "bfloat16")
    ours = gguf_files.write(folder, tmp_path / "ours", gguf_type).path
    theirs = tmp_path / "theirs.gguf"
    convert("convert_hf_to_gguf.py", folder, "--outfile", theirs, "--outtype", gguf_type)
    one, other = tensors(ours), tensors(theirs)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    found = differences(ours, theirs)
    record_property("tensors, all the same", len(one))
    record_property("metadata, ours | llama.cpp's", {key: found[key] for key in found if not key.startswith(OF_NAMES)})


def adapter(base, folder, **settings):
    """Save an adapter with random weights for a base, by PEFT."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
        for parameter in (one for one in model.parameters() if one.requires_grad):
            torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(
    ("name", "modules"),
    [("llama", "all-linear"), ("llama", ["embed_tokens", "lm_head", "k_proj"]), ("qwen2", "all-linear"),
     ("gemma2", "all-linear"), ("phi3", "all-linear")],
)  # fmt: skip
def test_an_adapter_is_what_llama_cpp_makes_of_it(name, modules, tiny_model, tmp_path, record_property):
    environment("convert")
    base = gguf_files.make(name, tiny_model, tmp_path / "model")
    folder = adapter(base, tmp_path / "adapter", target_modules=modules)
    ours = write_gguf_lora(tmp_path, [(folder, 1.0)], locate_base(str(base)))
    theirs = tmp_path / "theirs.gguf"
    convert("convert_lora_to_gguf.py", folder, "--base", base, "--outfile", theirs, "--outtype", "f32")
    one, other = tensors(ours), tensors(theirs)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    found = differences(ours, theirs)
    record_property("tensors, all the same", len(one))
    record_property("metadata, ours | llama.cpp's", {key: found[key] for key in found if not key.startswith(OF_NAMES)})
