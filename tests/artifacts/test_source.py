"""What a user names, resolved once: which base, which adapter, which template, and the notes on them."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from peft import LoraConfig

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.artifacts.source import UNCHECKED, open_adapter, open_source, verify_adapter
from lora_alpaca.errors import AdapterError, ConfigError, TemplateError
from lora_alpaca.models import lora
from lora_alpaca.models.base import locate_base

NO_ADAPTER = "no adapter in ./lora-alpaca yet: answering with the untrained demo base"


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory):
    """Return the folder of an adapter as PEFT saves it, with B that is not zero."""
    folder = tmp_path_factory.mktemp("source") / "adapter"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = lora.with_lora(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(tiny_llama)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved, here):
    """Return a copy of the adapter in the working folder, under the name that is looked for."""
    return Path(shutil.copytree(saved, "lora-alpaca"))


def forget_base(folder):
    settings = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": None}))


def test_nothing_named_and_nothing_there_is_the_demo(here):
    source = open_source()
    assert (source.base.name, source.adapter, source.info, source.template.name) == ("demo", None, None, "alpaca")
    assert source.notes == [NO_ADAPTER]
    assert source.verify() == []
    assert open_source(lora_weights="none").notes == ["model demo, without an adapter"]


def test_the_adapter_of_the_step_before_is_found(adapter, tiny_llama):
    for named in ("", str(tiny_llama), f"{tiny_llama}/../{tiny_llama.name}"):
        source = open_source(base_model=named, template="alpaca")
        assert source.adapter == adapter
        assert source.base.name == str(tiny_llama)
        assert source.notes == [f"adapter lora-alpaca on {tiny_llama}", UNCHECKED]
        assert source.verify() == [adapter_folder.UNKNOWN_BASE]


def test_it_is_left_out_for_another_base(adapter, tiny_llama, tiny_model):
    other = tiny_model("GPT2")
    source = open_source(str(other), template="alpaca")
    assert source.adapter is None
    assert source.notes == [
        f"lora-alpaca was made for {tiny_llama}: answering with {other} alone",
        f"model {other}, without an adapter",
        UNCHECKED,
    ]
    assert open_source(str(other), str(adapter), template="alpaca").adapter == adapter


def test_the_variable_names_a_base(here, tiny_llama, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(tiny_llama))
    assert open_source(template="alpaca").base.name == str(tiny_llama)
    assert open_source("demo").base.name == "demo"


def test_an_adapter_is_opened_by_its_folder(adapter, tiny_llama, tiny_model):
    source = open_adapter(adapter, template="vicuna")
    assert (source.adapter, source.base.name, source.template.name) == (adapter, str(tiny_llama), "vicuna")
    assert source.notes == [UNCHECKED]
    assert open_adapter(adapter, str(tiny_model("OPT")), template="alpaca").base.name == str(tiny_model("OPT"))


def test_a_template_is_recorded_or_named(adapter):
    for opened in (lambda: open_source(lora_weights=str(adapter)), lambda: open_adapter(adapter)):
        with pytest.raises(TemplateError, match=r"lora-alpaca records no prompt template; name the one"):
            opened()


def test_a_base_is_recorded_or_named(adapter, tiny_llama):
    forget_base(adapter)
    for opened, error in ((lambda: open_source(), ConfigError), (lambda: open_adapter(adapter), AdapterError)):
        with pytest.raises(error, match="lora-alpaca does not record its base model; name it with --base_model"):
            opened()
    assert open_source(str(tiny_llama), str(adapter), template="alpaca").adapter == adapter
    note = open_source(str(tiny_llama), template="alpaca").notes[0]
    assert note == f"lora-alpaca was made for an unknown base: answering with {tiny_llama} alone"


def test_the_tokenizer_is_that_of_the_adapter_if_it_brings_one(adapter, tiny_llama, here):
    source = open_source(template="alpaca")
    assert source.tokenizer_folder is None
    shutil.copy(tiny_llama / "tokenizer_config.json", adapter)
    assert source.tokenizer_folder == adapter
    shutil.copy(tiny_llama / "tokenizer.json", adapter)
    tokenizer, template, _ = source.load_tokenizer()
    assert Path(tokenizer.name_or_path) == adapter
    assert template.name == "alpaca"


def test_an_adapter_to_be_trained_further_is_verified(adapter, tiny_llama, tiny_model):
    base = locate_base(str(tiny_llama))
    assert verify_adapter("--init_adapter", adapter, base) == [adapter_folder.UNKNOWN_BASE]
    with pytest.raises(AdapterError, match="wrong base model"):
        verify_adapter("--init_adapter", adapter, locate_base(str(tiny_model("OPT"))))
    with pytest.raises(AdapterError, match="--init_adapter nowhere: no adapter there"):
        verify_adapter("--init_adapter", Path("nowhere"), base)
