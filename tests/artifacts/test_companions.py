"""The small files of a model as they go out: bytes of the base, and what readers old and new take from the others."""

import json
import shutil

import pytest
import torch
import transformers

from lora_alpaca.artifacts import companions
from lora_alpaca.artifacts.source import ModelSource
from lora_alpaca.errors import ModelError
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import load_template

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def content(path):
    return json.loads(path.read_text())


def changed(path, without=(), **keys):
    found = content(path) | keys if path.exists() else keys
    path.write_text(json.dumps({key: value for key, value in found.items() if key not in without}, indent=1))


@pytest.fixture
def base(tiny_llama, tmp_path):
    """Return a copy of a tiny base, with the files of transformers 4."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    old = {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "float32"}
    changed(folder / "config.json", ("rope_parameters", "dtype"), **old)
    return folder


@pytest.fixture
def written(tmp_path):
    """Return `written(folder)`: where the small files of a base went, and the notes on them."""

    def write(folder, stop_ids=(2,), dtype=torch.float32, tied=None, trusted=False):
        base = locate_base(str(folder), trust_remote_code=trusted)
        template = load_template("alpaca")
        source = ModelSource(base, None, None, template, [])
        tokenizer, _ = load_tokenizer(base)
        tied = bool(base.config.tie_word_embeddings) if tied is None else tied
        given = (source, tokenizer, template.bound(tokenizer), list(stop_ids), dtype, tied)
        out = tmp_path / "out"
        out.mkdir()
        return out, companions.write(out, *given)

    return write


# ----------------------------------------------------------------------------------------------------------- config


def test_files_that_nothing_changes_go_out_byte_for_byte(base, written):
    out, notes = written(base)
    assert notes == []
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_another_dtype_has_both_names_and_nothing_else_is_changed(base, written):
    out, _ = written(base, dtype=torch.bfloat16)
    assert content(out / "config.json") == content(base / "config.json") | {
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    assert transformers.AutoConfig.from_pretrained(out).dtype == torch.bfloat16


def test_a_head_that_is_tied_no_more_is_said(base, written):
    changed(base / "config.json", tie_word_embeddings=True)
    out, _ = written(base, tied=False)
    assert content(out / "config.json") == content(base / "config.json") | {"tie_word_embeddings": False}


def test_a_vocabulary_that_an_adapter_enlarged_is_said(base):
    found = locate_base(str(base))
    changed(base / "config.json", text_config={"vocab_size": found.vocabulary})
    after = content_of(companions._config(found, torch.float32, False, 700))
    assert after["vocab_size"] == after["text_config"]["vocab_size"] == 700


def test_a_model_that_was_stored_quantised_is_so_no_more(base, written):
    plain = content(base / "config.json")
    found = locate_base(str(base))
    changed(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    source = ModelSource(found, None, None, load_template("alpaca"), [])
    assert content_of(companions._config(source.base, torch.float32, False)) == plain


def test_no_path_of_a_machine_goes_out(base, written):
    plain = content(base / "config.json")
    changed(base / "config.json", _name_or_path="/home/me/secret/llama")
    changed(base / "tokenizer_config.json", name_or_path="/home/me/secret/llama", tokenizer_file="/root/t.json")
    out, _ = written(base)
    assert content(out / "config.json") == plain
    assert not content(out / "tokenizer_config.json").keys() & {"name_or_path", "tokenizer_file"}
    assert not [path for path in out.iterdir() if b"secret" in path.read_bytes()]


def content_of(one):
    return json.loads(one[0])


NEW = {  # what transformers 5 writes, and what transformers 4 reads of the same model
    "llama3": (
        {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    ),
    "default": (
        {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}},
        {"rope_theta": 1000000.0, "rope_scaling": None},
    ),
    "part": (
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
    ),
}


@pytest.mark.parametrize("kind", NEW)
def test_names_of_transformers_5_are_joined_by_those_of_4(kind, base, written):
    new, old = NEW[kind]
    without = ("rope_theta", "rope_scaling", "torch_dtype")
    changed(base / "config.json", without, dtype="float32", **new)
    before = transformers.AutoConfig.from_pretrained(base)
    out, _ = written(base)
    assert content(out / "config.json") == content(base / "config.json") | old | {"torch_dtype": "float32"}
    after = transformers.AutoConfig.from_pretrained(out)
    assert after.rope_parameters == before.rope_parameters and after.dtype == before.dtype


def test_old_names_of_architectures_with_names_of_their_own():
    of_neox = companions._old_rope({"rope_theta": 10000, "partial_rotary_factor": 0.25}, "gpt_neox")
    assert of_neox == {"rotary_emb_base": 10000, "rotary_pct": 0.25, "rope_scaling": None}
    kinds = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}}
    kinds |= {"sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    scaling = {"rope_type": "linear", "factor": 8.0}
    assert companions._old_rope(kinds, "gemma3_text") == {
        "rope_theta": 1e6,
        "rope_scaling": scaling,
        "rope_local_base_freq": 1e4,
    }


def test_configs_within_a_config_are_said_both_ways_too(base):
    inner = {"dtype": "float32", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    found = locate_base(str(base))
    changed(base / "config.json", text_config=inner, vision_config={"depth": 2})
    after = content_of(companions._config(found, torch.bfloat16, False))
    assert after["text_config"] == inner | {
        "dtype": "bfloat16", "torch_dtype": "bfloat16", "rope_theta": 1e6, "rope_scaling": None,
    }  # fmt: skip
    assert after["vision_config"] == {"depth": 2}


# ------------------------------------------------------------------------------------------------ generation config

SAMPLING = {"temperature": 0.9, "top_p": 0.6}


def accepted(path):
    """Raise what transformers says against saving a generation config."""
    transformers.GenerationConfig.from_pretrained(path).validate(strict=True)


def test_values_for_sampling_without_sampling_are_mended_and_that_is_known_before(base, written):
    before = {"eos_token_id": 2, "pad_token_id": 0, **SAMPLING}
    (base / "generation_config.json").write_text(json.dumps(before))
    out, [note] = written(base)
    assert content(out / "generation_config.json") == before | {"do_sample": True}
    assert "temperature, top_p without do_sample" in note and "\n" not in note
    accepted(out)


@pytest.mark.parametrize(
    "more",
    [{"early_stopping": True}, {"num_beams": "four"}, {"max_new_tokens": -1}, {"temperature": "hot"}, {"top_k": -3}],
)
def test_other_values_that_are_refused_are_left_out(more, base, written):
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **more}))
    out, _ = written(base)
    assert content(out / "generation_config.json")["eos_token_id"] == 2
    accepted(out)


@pytest.mark.parametrize(("stop_ids", "said"), [((2,), 2), ((2, 5), [2, 5]), ((), None)])
def test_all_tokens_that_end_an_answer_are_named(stop_ids, said, base, written):
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "top_k": 40, "do_sample": True}))
    out, _ = written(base, stop_ids=stop_ids)
    assert content(out / "generation_config.json") == {"eos_token_id": said, "top_k": 40, "do_sample": True}


def test_a_base_without_a_generation_config_gets_one(base, written):
    (base / "generation_config.json").unlink()
    out, _ = written(base, stop_ids=[2, 5])
    assert content(out / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": [2, 5]}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_damaged_is_an_error_of_one_line(name, base, tmp_path):
    found = locate_base(str(base))
    (base / name).write_text("{")
    source = ModelSource(found, None, None, load_template("alpaca"), [])
    with pytest.raises(ModelError, match=name) as error:
        companions.write(tmp_path, source, None, load_template("alpaca"), [2], torch.float32, False)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------- other files


def test_what_goes_along_and_what_does_not(base, written, tmp_path):
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    along = ["LICENSE", "NOTICE.txt", "USE_POLICY.md", "preprocessor_config.json", "a_list.txt"]
    stays = ["pytorch_model.bin", "model.safetensors.index.json", "lora_alpaca.json", "lora_alpaca.private.json"]
    stays += ["prompt_contract.json", "merge_receipt.json", "merge_receipt.md", "optimizer.pt", "trainer_state.json"]
    stays += [
        "adapter_config.json",
        "README.md",
        "modeling_own.py",
        "model.gguf",
        "params.json",
        "quantize_config.json",
    ]
    for name in along + stays:
        (base / name).write_text("{}")
    (base / "LICENCE").symlink_to(outside)
    (base / "COPYING").symlink_to("LICENSE")
    (base / "runs").mkdir()
    out, _ = written(base)
    own = ["chat_template.jinja", "config.json", "generation_config.json"]
    own += ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*own, *along, "COPYING"])


def test_files_of_the_hubs_cache_are_links_that_are_followed(base, written, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (base / "LICENSE").write_text("free")
    for path in base.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    out, _ = written(snapshot)
    for name in ("LICENSE", "config.json", "tokenizer.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (snapshot / name).read_bytes()
        assert not (out / name).is_symlink()


CODE = "from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM): pass\n"


def test_code_of_a_base_goes_along_where_it_is_trusted(base, written):
    changed(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (base / "modeling_own.py").write_text(CODE)
    (base / "helping.py").write_text("")
    out, notes = written(base, trusted=True)
    assert notes == []
    assert (out / "modeling_own.py").read_text() == CODE and (out / "helping.py").exists()
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_nothing_points_to_code_where_it_is_not(base, written):
    plain = content(base / "config.json")
    changed(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    changed(base / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenizing_own.Own"]})
    (base / "modeling_own.py").write_text(CODE)
    out, [note] = written(base)
    assert content(out / "config.json") == plain
    assert "auto_map" not in content(out / "tokenizer_config.json")
    assert "auto_map" in note and not list(out.glob("*.py"))
