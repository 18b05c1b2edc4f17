"""What a config names is loaded: its notes, its codecs, and the layers that are put in."""

import peft
import pytest
import torch
import transformers

from lora_alpaca import GenerateConfig
from lora_alpaca.inference import loading
from lora_alpaca.inference.layers.products import FewTokens
from lora_alpaca.inference.sampling import BASE

DEMO = {"prompt_template": "alpaca", "dtype": "fp32", "device": "cpu"}


def test_a_base_alone_answers_as_base(tiny_llama):
    loaded = loading.load(GenerateConfig(base_model=str(tiny_llama), lora_weights="none", **DEMO))
    assert loaded.adapters.names == (BASE,) and list(loaded.codecs) == [BASE]
    assert loaded.max_length == 512 and loaded.base_name == str(tiny_llama)


def test_generate_of_transformers_gives_what_it_gave(tiny_llama):
    """It reads the signature of the model's forward, which is another one now."""
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    loaded = loading.load(GenerateConfig(base_model=str(tiny_llama), lora_weights="none", **DEMO))
    ids = torch.arange(5, 25)[None]
    for options in ({}, {"num_beams": 3}):
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        with loaded.adapters.using(BASE) as model:
            assert torch.equal(model.generate(**asked, **options), own.generate(**asked, **options))


@pytest.mark.parametrize(("options", "quantised"), [({}, 0), ({"load_8bit": True}, 14), ({"load_4bit": True}, 14)])
def test_quantised_layers_are_replaced(options, quantised, tiny_llama):
    loaded = loading.load(GenerateConfig(base_model=str(tiny_llama), lora_weights="none", **DEMO | options))
    assert sum(isinstance(part.forward, FewTokens) for part in loaded.adapters.model.modules()) == quantised


def test_notes_are_said_once(tiny_llama, tmp_path, capsys):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    for name in ("one", "two"):
        lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, lora) if name == "one" else model  # noqa: F821  the same one again
        model.save_pretrained(tmp_path / name)
    weights = f"{tmp_path / 'one'}, {tmp_path / 'two'}"
    loaded = loading.load(GenerateConfig(base_model=str(tiny_llama), lora_weights=weights, **DEMO))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(set(said))
    assert "the adapters are computed beside the weights: there are several" in said
    assert list(loaded.codecs) == ["one", "two", BASE]
