"""Meta's checkpoint of a Llama, written: what Meta's own computation makes of it, and every bit read back."""

import json
import math
import zipfile

import pytest
import torch
import transformers
from exported import facts_of, state_of

from lora_alpaca.errors import ExportError
from lora_alpaca.export.writers import meta_format
from lora_alpaca.export.writers.meta_checkpoint import MetaCheckpointWriter

LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
MODELS = {
    "Llama 1": {"num_key_value_heads": 4, "intermediate_size": 256, "dtype": torch.float16},
    "Llama 2 with 2 heads for 4": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "dtype": torch.bfloat16},
    "Llama 3.1": {"num_key_value_heads": 1, "rope_parameters": LLAMA_3 | {"factor": 8.0}, "dtype": torch.bfloat16},
    "Llama 3.2, tied": {"rope_parameters": LLAMA_3 | {"factor": 32.0}, "tie_word_embeddings": True},
    "a base of rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "intermediate_size": 173},
}


@pytest.fixture
def model(tiny_model, tmp_path):
    """Return `model(**settings)`: the folder of a random Llama with the tokenizer of the tiny one."""

    def make(dtype=torch.float32, **settings):
        config = transformers.AutoConfig.from_pretrained(tiny_model("Llama"))
        found = config.to_dict() | settings
        torch.manual_seed(3)
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**found)).to(dtype)
        for name, weight in made.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        folder = tmp_path / "model"
        made.save_pretrained(folder)
        (folder / "tokenizer.model").write_bytes((tiny_model("Llama") / "tokenizer.model").read_bytes())
        return folder

    return make


def write(folder, to):
    """Write the model of a folder as Meta's checkpoint, and return the writer."""
    facts, tensors = facts_of(folder)
    writer = MetaCheckpointWriter(to, facts)
    to.mkdir()
    for name in tensors.infos:
        writer.write(name, tensors.read(name))
    writer.finish()
    return writer


def logits_of_meta(folder, ids, factor=8.0):
    """Return the logits of a checkpoint, computed in fp64 as Meta computes: neighbouring values turn together."""
    params = json.loads((folder / "params.json").read_text())
    weights = {
        name: tensor.double() for name, tensor in torch.load(folder / "consolidated.00.pth", weights_only=True).items()
    }
    heads, length = params["n_heads"], len(ids)
    kv_heads, size = params.get("n_kv_heads", heads), params["dim"] // heads
    turns = params.get("rope_theta", 10_000.0) ** -(torch.arange(0, size, 2).double() / size)
    if params.get("use_scaled_rope"):
        waves = 2 * math.pi / turns
        part = ((8192 / waves - 1) / 3).clamp(0, 1)  # 0 for waves longer than the context, 1 for a quarter of it
        turns = (1 - part) * turns / factor + part * turns
    circle = torch.polar(torch.ones(length, size // 2).double(), torch.outer(torch.arange(length).double(), turns))

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weights[name]

    def turn(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * circle[:, None]).flatten(-2)

    x = weights["tok_embeddings.weight"][ids]
    for number in range(params["n_layers"]):
        at = f"layers.{number}."
        y = norm(x, f"{at}attention_norm.weight")
        q, k, v = (y @ weights[f"{at}attention.w{kind}.weight"].T for kind in "qkv")
        q = turn(q.unflatten(-1, (heads, size)))
        k, v = turn(k.unflatten(-1, (kv_heads, size))), v.unflatten(-1, (kv_heads, size))
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ weights[f"{at}attention.wo.weight"].T
        y = norm(x, f"{at}ffn_norm.weight")
        gate, up = (y @ weights[f"{at}feed_forward.w{kind}.weight"].T for kind in "13")
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[f"{at}feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize("kind", MODELS)
def test_meta_computes_the_same(kind, model, tmp_path):
    folder = model(**MODELS[kind])
    writer = write(folder, tmp_path / "meta")
    ids = torch.randint(0, 600, (40,), generator=torch.Generator().manual_seed(1))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        expected = loaded(input_ids=ids[None]).logits[0]
    found = logits_of_meta(tmp_path / "meta", ids, factor=32.0 if "tied" in kind else 8.0)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # transformers turns in fp32

    back, state = writer.read_back(), state_of(folder)
    assert list(back.infos) and back.infos.keys() == state.keys()
    for name, tensor in state.items():
        assert (tensor.dtype, tuple(tensor.shape)) == back.infos[name]
        assert torch.equal(back.read(name).view(torch.uint8), tensor.view(torch.uint8))


def test_it_is_a_file_of_torch(model, tmp_path):
    """Other programs read it: unzip, torch.load with and without mapping; it takes no more room than torch.save's."""
    folder = model(tie_word_embeddings=True)
    writer = write(folder, tmp_path / "meta")
    file = tmp_path / "meta" / "consolidated.00.pth"
    assert zipfile.ZipFile(file).testzip() is None
    mapped, read = (torch.load(file, weights_only=True, mmap=mapped) for mapped in (True, False))
    assert mapped.keys() == read.keys()
    assert all(torch.equal(mapped[name], read[name]) for name in read)
    assert not any(tensor.data_ptr() % 64 for tensor in mapped.values())
    assert read["output.weight"].data_ptr() == read["tok_embeddings.weight"].data_ptr()  # tied: once in the file
    torch.save(read, tmp_path / "of_torch.pth")
    assert abs(file.stat().st_size - (tmp_path / "of_torch.pth").stat().st_size) < 2000
    assert file.stat().st_size <= writer.bytes_needed()
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_llama_1_is_described_as_meta_does(model, tmp_path):
    write(model(**MODELS["Llama 1"]), tmp_path / "meta")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    vocabulary = params.pop("vocab_size")
    assert params == {"dim": 64, "multiple_of": 256, "n_heads": 4, "n_layers": 2, "norm_eps": 1e-06}
    assert vocabulary == len(torch.load(tmp_path / "meta" / "consolidated.00.pth")["tok_embeddings.weight"])


SIZES = {  # dim and hidden size of Meta's own models, and what their params.json say or what amounts to it
    (4096, 11008): (256, None), (5120, 13824): (256, None), (8192, 22016): (256, None), (8192, 28672): (1024, 1.3),
    (4096, 14336): (1024, 1.3), (16384, 53248): (4096, 1.2), (3072, 8192): (256, None),
}  # fmt: skip


@pytest.mark.parametrize("dim", [64, 96, 576, 2048, 4096])
def test_any_hidden_size_follows_from_the_formula(dim):
    for hidden in [*range(1, 300), *range(300, 20_000, 97)]:
        multiple_of, multiplier = meta_format.ffn_rule(dim, hidden)
        size = int(2 * (4 * dim) / 3)  # as Meta's FeedForward works it out
        if multiplier is not None:
            size = int(multiplier * size)
        assert multiple_of * ((size + multiple_of - 1) // multiple_of) == hidden


@pytest.mark.parametrize("sizes", SIZES)
def test_metas_own_sizes(sizes):
    assert meta_format.ffn_rule(*sizes) == SIZES[sizes]


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
REFUSED = {
    "a qwen2 model": ("Qwen2", {}),
    "biases": ("Llama", {"attention_bias": True}),
    "gelu in its layers": ("Llama", {"hidden_act": "gelu"}),
    "rope scaling of type linear": ("Llama", {"rope_parameters": LINEAR}),
    "rope scaled by 4.0": ("Llama", {"rope_parameters": LLAMA_3 | {"factor": 4.0}}),
    "model.layers.0.self_attn.q_proj.weight of [128, 64]": ("Llama", {"head_dim": 32}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_meta_cannot_describe(what, tiny_model, model, tmp_path):
    architecture, settings = REFUSED[what]
    folder = model(**settings) if settings else tiny_model(architecture)
    with pytest.raises(ExportError, match="--format state_dict: Meta's checkpoints have no ") as error:
        MetaCheckpointWriter(tmp_path / "meta", facts_of(folder)[0])
    assert what in str(error.value)
    assert not (tmp_path / "meta").exists()
