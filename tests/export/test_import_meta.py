"""Meta's checkpoint, whole or in shards, becomes a folder for transformers: every bit, both ways, and its tokenizer."""

import base64
import json
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import sentencepiece
import torch
import transformers
from command import error_line, run
from exported import state_of
from test_meta_checkpoint import LLAMA_3, MODELS, model, write
from transformers.convert_slow_tokenizer import import_protobuf

from lora_alpaca.export.writers import meta_format
from lora_alpaca.export.writers.meta_format import Sizes

__all__ = ["model"]
COLUMNS, WHOLE = ("attention.wo", "feed_forward.w2"), ("norm.weight",)


def slice_in(shards, folder, to, embeddings=0):
    """Save the checkpoint of a folder as that of several processes: each has a slice of every matrix.

    Each file has one storage for all of its tensors, as Meta's have. `embeddings` is the dimension that they are
    sliced along.
    """
    to.mkdir()
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for number in range(shards):
        parts = {}
        for name, tensor in state.items():
            along = embeddings if name.startswith("tok_") else int(name.removesuffix(".weight").endswith(COLUMNS))
            parts[name] = tensor if name.endswith(WHOLE) else tensor.chunk(shards, along)[number]
        storage = torch.cat([part.reshape(-1) for part in parts.values()])
        places = torch.tensor([0, *(part.numel() for part in parts.values())]).cumsum(0).tolist()
        views = {
            name: storage[start : start + part.numel()].view(part.shape)
            for (name, part), start in zip(parts.items(), places, strict=False)
        }
        views["rope.freqs"] = torch.ones(8)
        torch.save(views, to / f"consolidated.{number:02}.pth")
    for path in folder.glob("*.[jm]*"):
        shutil.copy(path, to)


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


def logits(folder, **settings):
    ids = torch.randint(0, 600, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)(input_ids=ids).logits


@pytest.mark.parametrize("kind", MODELS)
def test_both_ways(kind, model, tmp_path):
    folder = model(**MODELS[kind])
    write(folder, tmp_path / "meta")
    result = run("import_meta", tmp_path / "meta", tmp_path / "new", "--context_length", 512)
    assert result.code == 0, result.err
    equal(state_of(tmp_path / "new"), state_of(folder))
    loaded, before = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "new", folder))
    different = {key for key, value in before.items() if loaded.get(key) != value}
    assert different <= {"_name_or_path", "initializer_range", "pad_token_id", "transformers_version"}
    assert torch.equal(logits(tmp_path / "new"), logits(folder))


@pytest.mark.parametrize("embeddings", [0, 1])
@pytest.mark.parametrize("kind", ["Llama 1", "Llama 2 with 2 heads for 4"])
def test_two_shards(kind, embeddings, model, tmp_path):
    folder = model(**MODELS[kind])
    write(folder, tmp_path / "whole")
    slice_in(2, tmp_path / "whole", tmp_path / "meta", embeddings)
    result = run("import_meta", tmp_path / "meta", tmp_path / "new", "--max_shard_size", "100KB")
    assert result.code == 0, result.err
    equal(state_of(tmp_path / "new"), state_of(folder))
    assert len(list((tmp_path / "new").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "new"), logits(folder))


def test_old_and_new_spelling(model, tmp_path):
    """Transformers before version 5 reads rope_theta, rope_scaling and torch_dtype, and since then other keys."""
    write(model(**MODELS["Llama 3.1"]), tmp_path / "meta")
    assert run("import_meta", tmp_path / "meta", tmp_path / "new").code == 0
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    scaling = {key: value for key, value in LLAMA_3.items() if key != "rope_theta"} | {"factor": 8.0}
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (5e5, scaling, "bfloat16")
    assert config["rope_parameters"] == scaling | {"rope_theta": 5e5}
    assert config["dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 131_072


LENGTHS = {  # of Meta's models, by what their params.json say
    2048: ({"norm_eps": 1e-6}, {"norm_eps": 1e-5, "n_layers": 80}),
    4096: ({"norm_eps": 1e-5}, {"norm_eps": 1e-5, "n_layers": 80, "n_kv_heads": 8}),
    16_384: ({"norm_eps": 1e-5, "rope_theta": 1e6},),
}


def test_context_length():
    from lora_alpaca.export.imports.import_meta import context_length

    for length, models in LENGTHS.items():
        assert {context_length({"n_layers": 32} | params, 32_000) for params in models} == {length}
    assert context_length({"norm_eps": 1e-5, "n_layers": 32, "rope_theta": 5e5}, 128_256) == 8192


def as_llamas(file):
    """Give a SentencePiece model a token of two spaces, the first of all and never used: LLaMA's has some of these."""
    found = import_protobuf().ModelProto.FromString(file.read_bytes())
    found.pieces[259].piece, found.pieces[259].score = "▁▁", -1e9
    file.write_bytes(found.SerializeToString())


TEXTS = ["Tell me about alpacas.", " two  spaces\n\nand lines\t", "Huascarán, 你好, שלום 🦙", "12 + 30 = 42", ""]


@pytest.mark.parametrize("above", [False, True])
def test_the_tokenizer_of_sentencepiece(above, model, tmp_path):
    folder = model()
    as_llamas(folder / "tokenizer.model")
    (tmp_path / "llama").mkdir()
    write(folder, tmp_path / "llama" / "7B")
    if above:  # where Meta puts the tokenizer of all sizes
        (tmp_path / "llama" / "7B" / "tokenizer.model").rename(tmp_path / "llama" / "tokenizer.model")
    assert run("import_meta", tmp_path / "llama" / "7B", tmp_path / "new").code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    for text in TEXTS:
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    generation = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}


def merged(text, ranks):
    """Return the ids that byte pair encoding by ranks gives a word: of all pairs, the one of the lowest rank first."""
    parts = [bytes([byte]) for byte in text.encode()]
    while True:
        pairs = [(ranks.get(one + two, 10**9), place) for place, (one, two) in enumerate(pairwise(parts))]
        rank, place = min(pairs, default=(10**9, 0))
        if rank == 10**9:
            return [ranks[part] for part in parts]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@pytest.mark.parametrize("scaled", [False, True])
def test_the_tokenizer_of_llama_3(scaled, model, tmp_path):
    words = [b"al", b"pa", b"ca", b"alpa", b"alpaca", b" a", b" alpaca", b"\xc3\xa1", b"an", b"\xf0\x9f", b"12"]
    ranks = {bytes([byte]): byte for byte in range(256)} | {word: 256 + number for number, word in enumerate(words)}
    rope = {"rope_parameters": LLAMA_3 | {"factor": 8.0}} if scaled else {}
    folder = model(vocab_size=len(ranks) + 256, **rope)
    (folder / "tokenizer.model").write_text("".join(f"{base64.b64encode(w).decode()} {r}\n" for w, r in ranks.items()))
    write(folder, tmp_path / "meta")
    assert run("import_meta", tmp_path / "meta", tmp_path / "new").code == 0

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    first = len(ranks)
    for text in ("alpaca", " alpaca", "Huascarán", "🦙", "12"):
        assert tokenizer(text).input_ids == [first, *merged(text, ranks)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    named = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7}
    named["<|eot_id|>"] = 9
    named |= {"<|finetune_right_pad_id|>": 4, "<|eom_id|>": 8, "<|python_tag|>": 10} if scaled else {}
    named |= {f"<|reserved_special_token_{247 if scaled else 250}|>": 255}
    for token, number in named.items():
        assert tokenizer(f"a{token}").input_ids[-1] == first + number
    generation = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [first + number for number in ((1, 8, 9) if scaled else (1, 9))]
    # what looks for `tokenizer.model` takes it for SentencePiece's; on the way back it is found where Meta has it
    assert not (tmp_path / "new" / "tokenizer.model").exists()
    write(tmp_path / "new", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


# ------------------------------------------------------------------------------------------------------------ refusals


def change(folder, **changes):
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps({key: value for key, value in params.items() if value is not None}))


def save(folder, change_state, shard=1):
    file = folder / f"consolidated.{shard:02}.pth"
    state = dict(torch.load(file, weights_only=True))
    change_state(state)
    torch.save(state, file)


def adding(name, tensor):
    return lambda state: state.update({name: tensor})


class Harmful:
    def __reduce__(self):
        return open, ("harm", "w")


SPOILT = {
    "consolidated.00.pth is missing": lambda f: (f / "consolidated.00.pth").unlink(),
    "consolidated.01.pth is missing": lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.02.pth"),
    "params.json: cannot be read": lambda f: (f / "params.json").unlink(),
    "params.json: damaged, n_heads is missing": lambda f: change(f, n_heads=None),
    "params.json: damaged, dim is 'x'": lambda f: change(f, dim="x"),
    "params.json: 64 values in 3 heads do not fit together": lambda f: change(f, n_heads=3),
    "do not describe one Llama: model.layers.0.self_attn.k_proj": lambda f: change(f, n_kv_heads=1),
    "do not describe one Llama: model without model.layers.2.": lambda f: change(f, n_layers=3),
    "layers.1.attention.wk.weight is no tensor of a Llama": lambda f: change(f, n_layers=1),
    "shard 1 lacks norm.weight": lambda f: save(f, lambda state: state.pop("norm.weight")),
    "vision.weight is no tensor of a Llama": lambda f: save(f, adding("vision.weight", torch.ones(1))),
    "the shards differ in norm.weight": lambda f: save(f, adding("norm.weight", torch.ones(64))),
    "slices of lm_head.weight": lambda f: save(f, adding("output.weight", torch.ones(320, 64).half())),
    "holds no plain tensors": lambda f: torch.save({"norm.weight": Harmful()}, f / "consolidated.01.pth"),
    "or is damaged; not loaded": lambda f: (f / "consolidated.01.pth").write_bytes(b"PK\3\4"),
    "it is another model's": lambda f: save_vocabulary(f, 600),
}


def save_vocabulary(folder, tokens):
    for shard in (0, 1):
        save(folder, lambda s: s.update({"tok_embeddings.weight": s["tok_embeddings.weight"][: tokens // 2]}), shard)
        save(folder, lambda s: s.update({"output.weight": s["output.weight"][: tokens // 2]}), shard)


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_checkpoint_is_refused(what, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(model(), tmp_path / "whole")
    slice_in(2, tmp_path / "whole", tmp_path / "meta")
    SPOILT[what](tmp_path / "meta")
    assert what in error_line(run("import_meta", tmp_path / "meta", tmp_path / "new"), 1)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "harm").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_where_it_is_written(model, tmp_path, monkeypatch):
    write(model(), tmp_path / "meta")
    (tmp_path / "new").mkdir()
    assert "is there already" in error_line(run("import_meta", tmp_path / "meta", tmp_path / "new"), 2)
    (tmp_path / "new").rmdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert "are free on that disk" in error_line(run("import_meta", tmp_path / "meta", tmp_path / "new"), 2)
    assert "no such folder" in error_line(run("import_meta", tmp_path / "nowhere", tmp_path / "new"), 1)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "meta"}


# -------------------------------------------------------------------------------------------------------------- memory

WATCHED = """
import sys, threading, time
from lora_alpaca.config import ImportMetaConfig
from lora_alpaca.export.imports.import_meta import import_meta
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
before, most = anonymous(), [0.0]
def watch():
    while True:
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
import_meta(ImportMetaConfig(old=sys.argv[1], new=sys.argv[2], max_shard_size=100_000_000))
print(most[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_a_tensor_and_not_the_model(tmp_path):
    """A model of 480 MB in two shards, whose largest tensor has 52 MB: two of these, and 64 MB that wait for a hash."""
    wide, hidden, layers, vocabulary = 2048, 6144, 4, 12_800
    sizes = Sizes(wide, layers, 16, 4, hidden, vocabulary)
    params = meta_format.params_of(sizes, 1e-5, 10_000.0, scaled=False)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    for number in range(2):
        shard = {}
        for name, shape in sizes.shapes(tied=False).items():
            meta = meta_format.meta_name(name)
            along = int(meta.removesuffix(".weight").endswith((*COLUMNS, "tok_embeddings")))
            sliced = [size // 2 if at == along and len(shape) == 2 else size for at, size in enumerate(shape)]
            shard[meta] = torch.ones(sliced, dtype=torch.bfloat16)
        torch.save(shard, tmp_path / "meta" / f"consolidated.{number:02}.pth")
    words = [sys.executable, "-c", WATCHED, tmp_path / "meta", tmp_path / "new"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert sum(path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors")) > 450e6
    assert float(done.stdout.splitlines()[-1]) < 200
