import json

import pytest
import torch
from conftest import as_row
from safetensors.torch import load_file, save_file

from lora_alpaca import ExportConfig, FinetuneConfig, export_hf, finetune
from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.errors import AdapterError, FolderError, ModelError
from lora_alpaca.models import lora
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import files_below, sha256


@pytest.fixture(scope="module")
def adapter(tiny_llama, rows, tmp_path_factory):
    """Return the folder of an adapter trained for a few steps."""
    folder = tmp_path_factory.mktemp("export")
    path = folder / "rows.json"
    path.write_text(json.dumps([as_row(conversation) for conversation in rows]))
    config = FinetuneConfig(
        base_model=str(tiny_llama), data_path=str(path), output_dir=str(folder / "adapter"), batch_size=4, max_steps=8,
        val_set_size=4, learning_rate=2e-2, cutoff_len=128, load_8bit=False, dtype="fp32", device="cpu",
    )  # fmt: skip
    return finetune(config).output_dir


def export(adapter, tmp_path, **options):
    return export_hf(ExportConfig(lora_weights=str(adapter), output_dir=str(tmp_path / "merged"), **options))


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def test_the_adapter_loads_with_plain_peft_and_the_merge_with_plain_transformers(adapter, tiny_llama, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = export(adapter, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("Where does the owl live?", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    plain = logits(base, ids)
    ours = logits(adapter_folder.load(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter).eval(), ids)
    theirs = logits(PeftModel.from_pretrained(base, adapter).eval(), ids)
    assert torch.equal(ours, theirs)
    assert (theirs - plain).abs().max() > 1e-2
    assert (logits(AutoModelForCausalLM.from_pretrained(merged), ids) - theirs).abs().max() < 1e-4


def test_the_merged_folder_has_tokenizer_template_and_stop_ids(adapter, tmp_path):
    """Upstream saves neither tokenizer nor template."""
    merged = export(adapter, tmp_path)
    record = output_folder.read_record(merged)
    contract = json.loads((merged / "prompt_contract.json").read_text())
    assert contract == json.loads((adapter / "prompt_contract.json").read_text())
    assert contract["template"]["prompt_input"].endswith("### Response:\n")
    assert record["stop_ids"] == [2]
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] in (2, [2])
    assert (merged / "tokenizer.json").is_file()
    assert set(record["files"]) | {output_folder.RECORD} == set(files_below(merged))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_saved_dtype(adapter, tmp_path, dtype):
    merged = export(adapter, tmp_path, dtype=dtype)
    state = load_file(merged / "model.safetensors")
    assert {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()} == {
        {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    }


def damaged(adapter, tmp_path, change):
    """Return a copy of the adapter with its tensors changed."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    save_file(change(load_file(copy / "adapter_model.safetensors")), copy / "adapter_model.safetensors")
    changed = {"adapter_sha256": sha256(copy / "adapter_model.safetensors")}
    atomic.replace(copy / output_folder.RECORD, atomic.as_json(output_folder.read_record(copy) | changed))
    return copy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {k: v * 0 if "lora_B" in k else v for k, v in state.items()}, "the adapter changes nothing"),
        (lambda state: {k: v * float("nan") for k, v in state.items()}, "holds NaN"),
        (lambda state: {}, "holds no tensors"),
        (lambda state: dict(list(state.items())[1:]), "is missing; wrong base model?"),
        (lambda state: {k.replace("layers.1", "layers.7"): v for k, v in state.items()}, "wrong base model?"),
        (
            lambda state: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in state.items()},
            "the base model needs",
        ),
    ],
)
def test_a_broken_adapter_is_refused_and_nothing_is_written(adapter, tmp_path, change, said):
    with pytest.raises(AdapterError, match=said.replace("?", r"\?")):
        export(damaged(adapter, tmp_path, change), tmp_path)
    assert not (tmp_path / "merged").exists()


def test_a_wrong_merge_is_caught(adapter, tmp_path, monkeypatch):
    from peft.tuners.lora import Linear

    from lora_alpaca.errors import ExportError

    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: delta(self, name) * 1.01)
    with pytest.raises(ExportError, match="differ from base \\+ adapter"):
        export(adapter, tmp_path)
    assert not (tmp_path / "merged").exists()


def test_the_wrong_base_is_refused(adapter, tmp_path, tiny_model):
    with pytest.raises((AdapterError, ModelError)):
        export(adapter, tmp_path, base_model=str(tiny_model("OPT")))


def test_a_foreign_folder_is_refused(adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "x").write_text("mine")
    with pytest.raises(FolderError, match="was not made by lora_alpaca"):
        export(adapter, tmp_path, overwrite=True)


def test_overwrite(adapter, tmp_path):
    export(adapter, tmp_path)
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    export(adapter, tmp_path, overwrite=True)
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"
    assert OutputFolder(tmp_path / "merged").status == "finished"
    assert not (tmp_path / "merged.1").exists()


def test_a_run_that_never_finished_is_refused(adapter, tmp_path):
    copy = damaged(adapter, tmp_path, dict)
    atomic.replace(copy / output_folder.RECORD, atomic.as_json(output_folder.read_record(copy) | {"status": "running"}))
    with pytest.raises(AdapterError, match="never finished; go on with it"):
        export(copy, tmp_path)


def test_a_4bit_base_is_not_changed_by_evaluating_and_saving(tiny_llama):
    """bitsandbytes 0.50 repacks 4-bit weights on CPUs with AVX512-BF16, and reads them back wrongly."""
    from lora_alpaca.models.base import load_base, locate_base
    from lora_alpaca.models.device import choose_device

    config = FinetuneConfig(load_4bit=True, dtype="fp32", device="cpu")
    base = locate_base(str(tiny_llama))
    model = lora.attach(load_base(base, choose_device(config, default_bits=8)[0])[0], config, base)
    ids = torch.tensor([[1, 5, 9, 30]])
    before = logits(model.eval(), ids)
    lora.state(model)
    model.state_dict()
    assert torch.equal(before, logits(model, ids))
    flags = [part.support_avx512bf16_for_cpu for part in model.modules() if hasattr(part, "support_avx512bf16_for_cpu")]
    assert flags
    assert not any(flags)
