"""Adapters of PEFT's own, of kinds that we do not train: exported whole, or refused in one line, and generated with."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from command import error_in, run
from conftest import SIZES
from every_kind import ARCHITECTURES, IDS, KINDS, adapted, distance, lora, of
from faults.scene import make_model

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return `base(kind)`: a tiny model with a tokenizer: a Llama, one whose head is its embeddings, or a Mixtral."""
    folder = tmp_path_factory.mktemp("bases")

    def made(kind):
        path = folder / kind
        if not path.exists():
            make_model(path)
            config = transformers.AutoConfig.from_pretrained(path)
            config.tie_word_embeddings = kind == "tied"
            if kind == "Mixtral":
                facts = SIZES | EXPERTS | {"num_hidden_layers": 1, "hidden_size": 32}
                config = transformers.MixtralConfig(vocab_size=config.vocab_size, **facts)
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        return path

    return made


def saved(base, folder, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(base, kind, ARCHITECTURES["Llama"])
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


MERGED = [
    ("Mixtral", lora(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    ("tied", lora(target_modules=["q_proj", "lm_head"])),
    pytest.param("tied", lora(modules_to_save=["lm_head"]), marks=pytest.mark.slow),
    ("Llama", lora(bias="lora_only", trainable_token_indices=[41, 42])),
    ("Llama", of(peft.TrainableTokensConfig, target_modules=["embed_tokens"], token_indices=[41, 42])),
    pytest.param("Llama", KINDS["AdaLoRA"], marks=pytest.mark.slow),
    pytest.param("Llama", KINDS["IA3"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "kind"), MERGED, ids=range(len(MERGED)))
def test_it_is_exported_and_answers_as_base_and_adapter(name, kind, base, tmp_path):
    model = saved(base(name), tmp_path / "adapter", kind)
    found = run(
        "export", "--base_model", base(name), "--lora_weights", tmp_path / "adapter", "--output_dir", tmp_path / "out",
        "--prompt_template", "alpaca", "--dtype", "fp32",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "Warning" not in found.err + found.out
    assert ("was loaded whole" in found.out + found.err) == (name == "Mixtral")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert distance(logits(merged), logits(model)) < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings", False) is False


def test_an_adapter_of_a_changed_base_is_refused_in_one_line(base, tmp_path):
    saved(base("Llama"), tmp_path / "adapter", lora(init_lora_weights="pissa_niter_4"))
    flags = ["--base_model", base("Llama"), "--lora_weights", tmp_path / "adapter", "--prompt_template", "alpaca"]
    for verb, more in (("export", ["--output_dir", tmp_path / "out"]), ("generate", ["--instruction", "Hello."])):
        found = run(verb, *flags, *more)
        assert found.code == 1
        assert "init_lora_weights is pissa_niter_4: this adapter needs a base that was changed" in error_in(found.err)
    assert not (tmp_path / "out").exists()


def test_what_only_export_takes_is_refused_by_generate(base, tmp_path):
    saved(base("Llama"), tmp_path / "adapter", KINDS["IA3"])
    flags = ["--base_model", base("Llama"), "--lora_weights", tmp_path / "adapter", "--prompt_template", "alpaca"]
    found = run("generate", *flags, "--instruction", "Hello.")
    assert (found.code, "describes no LoRA adapter (peft_type is IA3)" in error_in(found.err)) == (1, True)
