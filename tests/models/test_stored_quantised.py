"""A base that is stored quantised: held and recorded as what it is, merged into what it was made of, or refused."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from command import error_line, run

from lora_alpaca.config import FinetuneConfig, GenerateConfig
from lora_alpaca.errors import ConfigError, ModelError
from lora_alpaca.models import quantization
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec, as_stored

CPU = torch.device("cpu")
SPEC = DeviceSpec(CPU, torch.float32, 8)
KINDS = {
    "4-bit (NF4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "4-bit (FP4)": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8-bit (LLM.int8)": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def stored(tiny_llama, tmp_path_factory):
    """Return `stored(kind)`: the tiny Llama as bitsandbytes' users publish it, quantised in its files."""

    def make(kind):
        folder = tmp_path_factory.mktemp("stored") / "base"
        shutil.copytree(tiny_llama, folder)
        asked = transformers.BitsAndBytesConfig(**KINDS[kind])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's, of which none may come later
            model = transformers.AutoModelForCausalLM.from_pretrained(
                tiny_llama, quantization_config=asked, device_map={"": "cpu"}
            )
            model.save_pretrained(folder)
        return folder

    made = {}
    return lambda kind: made.setdefault(kind, None) or made.update({kind: make(kind)}) or made[kind]


def words(base, data_path, tmp_path, *more):
    size = ["--max_steps", 2, "--batch_size", 2, "--val_set_size", 0, "--cutoff_len", 96, "--learning_rate", 1e-2]
    return ["--base_model", base, "--data_path", data_path, *size, "--output_dir", tmp_path / "out", *more]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_recorded_and_held_as_it_is_stored(kind, stored, data_path, tmp_path, tiny_llama):
    base = stored(kind)
    result = run("finetune", *words(base, data_path, tmp_path))
    assert result.code == 0, result.err
    assert f"base: {base}, {kind} base, " in result.out
    assert result.out.count(f"the base is stored as {kind} and held so; export merges into the model") == 1
    assert result.err == ""
    record = json.loads((tmp_path / "out" / "lora_alpaca.json").read_text())
    assert record["precision"].startswith(f"{kind} base, ")
    assert record["base_stored_as"] == kind
    asked = ["--lora_weights", tmp_path / "out", "--instruction", "Hi.", "--max_new_tokens", 2, "--device", "cpu"]
    assert run("generate", *asked).code == 0

    merge = ["--lora_weights", tmp_path / "out", "--output_dir", tmp_path / "merged"]
    line = error_line(run("export", *merge), 1)
    assert f"is stored quantised ({kind}), and merging needs full precision: name the model that it was" in line
    merged = run("export", *merge, "--base_model", tiny_llama)
    assert merged.code == 0, merged.err
    assert f"is stored as {kind}: the weights of {tiny_llama} cannot be compared with it by a hash" in merged.out


def test_another_model_is_not_merged_into(stored, data_path, tmp_path, tiny_model):
    assert run("finetune", *words(stored("4-bit (NF4)"), data_path, tmp_path)).code == 0
    merge = ["--lora_weights", tmp_path / "out", "--output_dir", tmp_path / "merged"]
    line = error_line(run("export", *merge, "--base_model", tiny_model("OPT")), 1)
    assert "wrong base model?" in line or "does not fit this base model" in line


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_the_file_and_the_compute_dtype_is_ours(kind, stored, tiny_llama):
    base = locate_base(str(stored(kind)))
    spec, _ = as_stored(SPEC, base.config, base.name, FinetuneConfig())
    assert str(spec) == f"{kind} base, fp32 compute on cpu"
    model, notes = load_base(base, spec)
    assert notes == []
    layers = [part for part in model.modules() if type(part).__module__.startswith("bitsandbytes")]
    assert len(layers) == 2 * 7
    assert all(getattr(layer, "compute_dtype", torch.float32) in (None, torch.float32) for layer in layers)
    asked = transformers.BitsAndBytesConfig(**KINDS[kind], bnb_4bit_compute_dtype=torch.float32)
    made_now = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=asked, device_map={"": "cpu"}, dtype=torch.float32
    )
    quantization.disable_repacking(made_now)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = model(input_ids=ids).logits, made_now.eval()(input_ids=ids).logits
    assert (one.dtype, torch.allclose(one, other, atol=1e-4)) == (torch.float32, True)


@pytest.mark.parametrize("verb", ["finetune", "generate"])
@pytest.mark.parametrize("found", [
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4}, {"quant_method": "fp8"},
    {"quant_method": "mxfp4"}, {"quant_method": "a-kind-to-come"},
])  # fmt: skip
def test_other_kinds_are_refused_before_they_are_loaded(found, verb, tiny_llama, data_path, tmp_path, no_model_loads):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": found}))
    asked = words(base, data_path, tmp_path) if verb == "finetune" else ["--base_model", base, "--instruction", "Hi."]
    asked += ["--prompt_template", "alpaca"] * (verb == "generate")
    line = error_line(run(verb, *asked), 1)
    assert f"--base_model {base} is stored quantised by {found['quant_method']}; only 4 and 8 bits of" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "said", "flag"),
    [
        ("4-bit (NF4)", {"load_8bit": False}, "--load_8bit False"),
        ("4-bit (NF4)", {"load_8bit": True}, "--load_8bit True"),
        ("4-bit (NF4)", {"load_8bit": False, "load_4bit": True}, ""),
        ("4-bit (NF4)", {"load_4bit": True}, ""),
        ("4-bit (NF4)", {}, ""),
        ("8-bit (LLM.int8)", {"load_8bit": False}, "--load_8bit False"),
        ("8-bit (LLM.int8)", {"load_8bit": True}, ""),
        ("8-bit (LLM.int8)", {"load_4bit": True}, "--load_4bit True"),
    ],
)
@pytest.mark.parametrize("options", [FinetuneConfig, GenerateConfig])
def test_flags_that_ask_for_other_bits_are_refused(kind, said, flag, options):
    config = transformers.LlamaConfig(quantization_config={"quant_method": "bitsandbytes"} | KINDS[kind])
    if not flag:
        spec, _ = as_stored(SPEC, config, "base", options(**said))
        assert (spec.bits, spec.kind) == (int(kind[0]), kind)
        return
    with pytest.raises(ConfigError, match=f"{flag}: base is stored as"):
        as_stored(SPEC, config, "base", options(**said))


def test_where_it_cannot_be_held(monkeypatch):
    config = transformers.LlamaConfig(quantization_config={"quant_method": "bitsandbytes"} | KINDS["4-bit (NF4)"])
    with pytest.raises(ModelError, match="which mps cannot hold"):
        as_stored(DeviceSpec(torch.device("mps"), torch.float16, 16), config, "base", GenerateConfig())
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install bitsandbytes, or name the model that it was quantised from"):
        as_stored(SPEC, config, "base", GenerateConfig())


def test_a_base_that_is_not_quantised_is_held_as_asked():
    assert as_stored(SPEC, transformers.LlamaConfig(), "base", GenerateConfig()) == (SPEC, [])
    assert quantization.stored(transformers.LlamaConfig()) is None
