import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import short_run
import torch
from conftest import as_row
from safetensors.torch import load_file, save_file

from lora_alpaca import ExportConfig, FinetuneConfig, export_hf, finetune
from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.errors import AdapterError, ConfigError, ExportError, FolderError, ModelError
from lora_alpaca.export.merge.deltas import Deltas
from lora_alpaca.export.verify import served_receipt
from lora_alpaca.export.writers.huggingface import HuggingFaceWriter
from lora_alpaca.export.writers.meta_checkpoint import MetaCheckpointWriter
from lora_alpaca.models import lora
from lora_alpaca.models.shards import Shards
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import files_below, sha256


@pytest.fixture(scope="module")
def adapter(tiny_llama, rows, tmp_path_factory):
    """Return the folder of an adapter trained for a few steps."""
    return short_run.adapter(tmp_path_factory.mktemp("export"), tiny_llama, rows)


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
    merged = Deltas.merged

    def wrong(self, name, tensor, dtype):
        return (tensor + 1.01 * (merged(self, name, tensor, torch.float32) - tensor)).to(dtype)

    monkeypatch.setattr(Deltas, "merged", wrong)
    with pytest.raises(ExportError, match="differ from base \\+ adapter"):
        export(adapter, tmp_path)
    assert not (tmp_path / "merged").exists()
    assert export(adapter, tmp_path, receipt=False).is_dir()


@pytest.mark.parametrize("name", ["hf", "state_dict"])
def test_a_wrong_file_is_caught(adapter, tmp_path, monkeypatch, name):
    """The merge is right, and what lies on the disk is not: the proof is of the files."""
    writer = {"hf": HuggingFaceWriter, "state_dict": MetaCheckpointWriter}[name]
    write = writer.write

    def wrong(self, tensor_name, tensor):
        write(self, tensor_name, tensor.flip(0) if "embed_tokens" in tensor_name else tensor)

    monkeypatch.setattr(writer, "write", wrong)
    with pytest.raises(ExportError, match=f"what was written as {name}"):
        export(adapter, tmp_path, format=["hf", "state_dict"])
    assert not (tmp_path / "merged").exists()


def test_adapters_on_different_bases_have_no_sum(adapter, tmp_path, tiny_llama):
    other = shutil.copytree(adapter, tmp_path / "other")
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    for name in (output_folder.RECORD, "lora_alpaca.private.json"):
        content = json.loads((other / name).read_text())
        content["base_model"] = base.name if name == output_folder.RECORD else str(base)
        (other / name).write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="adapters on different bases"):
        export(f"{adapter},{other}", tmp_path)


def test_a_merge_that_changes_nothing_is_caught(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(Deltas, "merged", lambda self, name, tensor, dtype: tensor.to(dtype))
    for receipt in (True, False):
        with pytest.raises(AdapterError, match="changes no tensor"):
            export(adapter, tmp_path, receipt=receipt)
    assert not (tmp_path / "merged").exists()


def test_the_receipt_accounts_for_every_tensor(adapter, tiny_llama, tmp_path):
    merged = export(adapter, tmp_path)
    receipt = json.loads((merged / "merge_receipt.json").read_text())
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(merged / "model.safetensors")
    assert receipt["tensors"].keys() == after.keys() == before.keys()
    for name, facts in receipt["tensors"].items():
        assert facts["sha256"] == hashlib.sha256(after[name].numpy().tobytes()).hexdigest()
        assert (facts["kind"] == "copied") == torch.equal(before[name], after[name])
        assert facts["kind"] == ("merged" if "q_proj" in name or "v_proj" in name else "copied")
        assert facts["shape"] == list(after[name].shape)
    assert receipt["changed_tensors"] == receipt["counts"]["merged"] == 4
    assert receipt["merge_error"] < 1e-5 < 1e-3 < receipt["adapter_effect"]
    found = receipt["formats"]["hf"]
    assert found["same_top_token"] == 1 and found["kl"] < 1e-9
    assert receipt["samples"]["tokens"] <= 512 and receipt["samples"]["rows"] > 0
    assert found["loss"] == pytest.approx(found["loss_of_base_and_adapter"], abs=1e-5)
    page = (merged / "merge_receipt.md").read_text()
    assert "100.0%" in page and "4 merged" in page
    assert str(adapter) not in json.dumps(receipt) + page
    assert served_receipt.read(merged, "--lora_weights").probes


def test_several_formats_in_one_pass(adapter, tmp_path):
    """Each in a folder of its own, and every one compared; the one of `hf` is a model of ours as if it were alone."""
    reads = []
    read = Shards.read

    def counted(self, name):
        reads.append(name)
        return read(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "read", counted)
        both = export(adapter, tmp_path, format=["hf", "state_dict"], receipt=False)
    assert len(reads) == len(set(reads))
    alone = export(adapter, tmp_path / "alone")
    assert (both / "hf" / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert (both / "state_dict" / "consolidated.00.pth").is_file()
    assert output_folder.read_record(both)["status"] == "finished"
    assert set(output_folder.read_record(both)["files"]) | {output_folder.RECORD} == set(files_below(both))
    both = export(adapter, tmp_path, format=["hf", "state_dict"], overwrite=True)
    receipt = json.loads((both / "merge_receipt.json").read_text())
    assert receipt["formats"].keys() == {"hf", "state_dict"}
    assert receipt["formats"]["state_dict"]["kl"] < 1e-9


def test_shards_of_a_size(adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = export(adapter, tmp_path / "whole")
    parts = export(adapter, tmp_path / "parts", max_shard_size="100KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 2
    assert not (parts / "model.safetensors").exists()
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert output_folder.read_record(parts)["weights"].keys() == {path.name for path in parts.glob("model-*")}


def test_a_sum_of_adapters(adapter, tmp_path, tiny_llama):
    """Twice the same half is the whole; an adapter and its opposite are the base, which is no export."""
    copies = [tmp_path / name for name in ("one", "two")]
    for copy in copies:
        shutil.copytree(adapter, copy)
    both = ",".join(map(str, copies))
    whole = export(adapter, tmp_path / "whole")
    halves = export(both, tmp_path / "halves", adapter_weights="0.5,0.5")
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, halves))
    assert all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-8) for name in one)
    assert [part["weight"] for part in json.loads((halves / "merge_receipt.json").read_text())["adapters"]] == [
        0.5,
        0.5,
    ]
    with pytest.raises(ConfigError, match="--adapter_weights: 1 for 2 adapters"):
        export(both, tmp_path / "none", adapter_weights="0.5")
    with pytest.raises(AdapterError, match="changes no"):
        export(both, tmp_path / "none", adapter_weights="1,-1")


def test_what_training_held_is_measured_and_can_be_merged_into(tiny_llama, rows, tmp_path):
    row_file = tmp_path / "rows.json"
    row_file.write_text(json.dumps([as_row(conversation) for conversation in rows]))
    run = finetune(
        FinetuneConfig(base_model=str(tiny_llama), data_path=str(row_file), output_dir=str(tmp_path / "adapter"),
                       load_4bit=True, max_steps=4, learning_rate=1e-2, val_set_size=4)
    )  # fmt: skip
    found = {}
    for target in ("full_precision", "quantised_values"):
        folder = export(run.output_dir, tmp_path / target, merge_into=target)
        found[target] = json.loads((folder / "merge_receipt.json").read_text())
    assert found["full_precision"]["to_training"]["bits"] == 4
    kl = {target: receipt["to_training"]["kl"] for target, receipt in found.items()}
    assert kl["quantised_values"] < 1e-8 < 1e-5 < kl["full_precision"]


def test_quantised_values_of_an_adapter_that_knows_none(adapter, tmp_path):
    with pytest.raises(ConfigError, match="records no base in 8 or 4 bits"):
        export(adapter, tmp_path, merge_into="quantised_values")


def test_a_disk_that_is_too_small(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(FolderError, match="name a folder on another one"):
        export(adapter, tmp_path)
    assert list(tmp_path.iterdir()) == []


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
