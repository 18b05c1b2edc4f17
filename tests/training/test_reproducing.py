"""`reproduce`: the same run bit for bit, and a sentence on everything that makes it another one."""

import json
import shutil

import pytest
import short_run
import torch
from command import error_line, run
from folders import contents
from safetensors.torch import load_file

from lora_alpaca.artifacts import privacy
from lora_alpaca.config import FinetuneConfig, ReproduceConfig
from lora_alpaca.training.reproduction import reproducing
from lora_alpaca.training.reproduction.comparison import Comparison, Loss
from lora_alpaca.training.reproduction.repetition import Repetition

SHORT = {"max_steps": 3, "eval_steps": 1, "logging_steps": 1, "report": False, "seed": 7}


@pytest.fixture(scope="module")
def trained(tiny_llama, rows, tmp_path_factory):
    """Return the folder of a short run; to be copied, not written to."""
    return short_run.adapter(tmp_path_factory.mktemp("trained"), tiny_llama, rows, **SHORT)


@pytest.fixture
def ours(trained, tmp_path):
    """Return a copy of that folder and of its rows, which its private record names."""
    shutil.copytree(trained, tmp_path / "adapter")
    shutil.copy(trained.parent / "rows.json", tmp_path / "rows.json")
    edit(tmp_path / "adapter" / privacy.FILE, lambda record: record["options"].update(data_path=str(data(tmp_path))))
    return tmp_path / "adapter"


def data(folder):
    return folder / "rows.json"


def edit(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def edit_record(folder, change):
    edit(folder / "lora_alpaca.json", change)


def reproduced(folder, *words):
    """Return how `reproduce` ends, having changed nothing in the folder of the adapter."""
    before = contents(folder)
    result = run("reproduce", folder, *words)
    assert contents(folder) == before
    return result


# ---------------------------------------------------------------------------------------------------------- the same


def test_a_run_is_made_again_bit_for_bit(ours):
    result = reproduced(ours)
    again = ours.with_name("adapter-reproduced")
    assert (result.code, result.err) == (0, "")
    assert short_run.same(ours, again)
    lines = result.out.splitlines()
    assert "made of what it was: base, tokenizer, rows, template" in lines
    assert "hardware and versions are those recorded: the result has to be the same, bit for bit" in lines
    assert lines[-1] == f"{ours} and {again}: identical"
    one, other = (json.loads((folder / "lora_alpaca.json").read_text()) for folder in (ours, again))
    assert other["reproduces"] == one["run"]
    assert other["adapter_sha256"] == one["adapter_sha256"]
    assert other["plan"] == one["plan"]


def test_as_json_and_into_a_named_folder(ours, tmp_path):
    result = reproduced(ours, "--json", "--output_dir", tmp_path / "new")
    found = json.loads(result.out)
    assert result.code == 0
    assert (found["verdict"], found["differing_tensors"], found["elsewhere"]) == ("identical", 0, {})
    steps = [(loss["step"], loss["kind"]) for loss in found["losses"]]
    assert steps == [(0, "validation_loss"), *[(n, kind) for n in (1, 2, 3) for kind in ("loss", "validation_loss")]]
    assert all(loss["recorded"] == loss["again"] for loss in found["losses"])
    assert (tmp_path / "new" / "adapter_model.safetensors").is_file()


def test_the_plan_is_the_recorded_one(ours):
    """Packs of another size have other sums, so that a plan of this machine's memory would not do."""
    edit_record(ours, lambda record: record["plan"].update(token_budget=64))
    result = reproduced(ours)
    assert "engine: packs of 64 tokens" in result.out
    assert result.code == 1


def test_as_many_threads_as_then(tiny_llama, rows, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        folder = short_run.adapter(tmp_path, tiny_llama, rows, **SHORT)
        torch.set_num_threads(1)
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        result = reproduced(folder)
    finally:
        torch.set_num_threads(before)
    assert "computing with 2 threads (as when the run began), not 1" in result.out
    assert "hardware and versions are those recorded" in result.out
    assert result.out.splitlines()[-1].endswith(": identical")


@pytest.mark.parametrize("recorded, expected", [(64, 64), (65, None), (0, None), (True, None), ("2", None)])
def test_threads_without_cores_for_them_are_not_those_of_then(recorded, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    run = FinetuneConfig(base_model="x", output_dir=str(tmp_path / "again"))
    of = ReproduceConfig(adapter=str(tmp_path))
    start = Repetition(run, tmp_path / "again", recorded={"hardware": {"threads": recorded}}, of=of)
    assert start.threads == expected


def test_rows_are_found_from_another_folder(tiny_llama, rows, tmp_path, monkeypatch):
    (tmp_path / "then").mkdir()
    monkeypatch.chdir(tmp_path / "then")
    folder = short_run.adapter(tmp_path / "then", tiny_llama, rows, data_path="rows.json", **SHORT)
    (tmp_path / "now").mkdir()
    monkeypatch.chdir(tmp_path / "now")
    assert reproduced(folder).code == 0


def test_the_template_is_the_recorded_one(tiny_llama, rows, tmp_path):
    template = tmp_path / "mine.json"
    mine = {"prompt_input": "{instruction}: {input}=", "prompt_no_input": "{instruction}=", "response_split": "="}
    template.write_text(json.dumps(mine))
    folder = short_run.adapter(tmp_path, tiny_llama, rows, prompt_template_name=str(template), **SHORT)
    template.write_text(json.dumps(mine | {"prompt_no_input": "{instruction}!="}))
    result = reproduced(folder)
    assert result.code == 0
    assert f"template as recorded; {template} says something else by now" in result.out
    template.unlink()
    assert reproduced(folder).code == 0


def test_a_model_that_was_finetuned_whole(tiny_llama, rows, tmp_path):
    options = {name: value for name, value in SHORT.items() if name != "learning_rate"}
    folder = short_run.adapter(tmp_path, tiny_llama, rows, tune="full", load_8bit=None, **options)
    result = reproduced(folder)
    assert result.code == 0
    number = len(load_file(folder / "model.safetensors"))
    assert f"{number} of {number} tensors are the same, bit for bit" in result.out
    assert result.out.splitlines()[-1].endswith(": identical")


def test_an_adapter_that_started_from_another(ours, tiny_llama, rows, tmp_path):
    (tmp_path / "next").mkdir()
    folder = short_run.adapter(tmp_path / "next", tiny_llama, rows, init_adapter=str(ours), **SHORT)
    assert reproduced(folder).code == 0
    shutil.copytree(folder, ours, dirs_exist_ok=True)
    line = error_line(reproduced(folder, "--overwrite"), 2)
    assert f"--init_adapter {ours}: init_adapter_sha256 was " in line


# -------------------------------------------------------------------------------------------------------- elsewhere


def test_another_version_is_told_and_the_run_goes_on(ours):
    edit_record(ours, lambda record: record["versions"].update(torch="9.9", numpy="1.0"))
    result = reproduced(ours, "--json")
    assert "not as recorded: torch was 9.9 and is 2." in result.err
    assert "; numpy was 1.0 and is " in result.err
    assert (result.code, json.loads(result.out)["verdict"]) == (0, "identical")


def test_elsewhere_losses_are_compared(ours):
    """With another seed, as other rounding would, in a record that says that it is of other hardware."""
    edit_record(ours, lambda record: record["options"].update(lora_dropout=0.06))
    edit_record(ours, lambda record: record["hardware"].update(processor="another"))
    result = reproduced(ours, "--tolerance", 1)
    assert result.code == 0, result.err
    assert "not as recorded: processor was another and is " in result.out
    assert result.out.splitlines()[-1].endswith(": the same run as far as can be told elsewhere: losses are within 1")
    line = error_line(reproduced(ours, "--tolerance", 0), 1)
    assert line.endswith("and a validation loss by more than --tolerance 0")


@pytest.mark.parametrize(
    ("differing", "gap", "elsewhere", "tolerance", "verdict"),
    [
        (0, 0.0, {}, 0.0, "identical"),
        (0, 0.0, {"torch": ""}, 0.0, "identical"),
        (1, 0.0, {}, 1.0, "different"),  # the same place makes the same bits
        (0, 1e-9, {}, 1.0, "different"),
        (1, 0.01, {"torch": ""}, 0.01, "close"),
        (1, 0.02, {"torch": ""}, 0.01, "different"),
    ],
)
def test_the_verdict(differing, gap, elsewhere, tolerance, verdict, tmp_path):
    losses = [Loss(0, "validation_loss", 1.0, 1.0), Loss(1, "loss", 1.0, 1.0 + gap), Loss(1, "validation_loss", 0, gap)]
    found = Comparison(tmp_path, 2, differing, 0.0, 0.0, losses, elsewhere)
    assert found.verdict(tolerance) == verdict


# -------------------------------------------------------------------------------------------------- what is missing


@pytest.mark.usefixtures("no_model_loads")
def test_a_row_that_was_changed(ours):
    found = json.loads(data(ours.parent).read_text())
    found[3]["output"] += "!"
    data(ours.parent).write_text(json.dumps(found))
    line = error_line(reproduced(ours), 2)
    was = json.loads((ours / "lora_alpaca.json").read_text())["data_sha256"][:12]
    assert f"was made of something else (--data_path {data(ours.parent)}: data_sha256 was {was} and is " in line
    assert "base_sha256" not in line
    assert not ours.with_name("adapter-reproduced").exists()


@pytest.mark.usefixtures("no_model_loads")
def test_all_that_is_another_is_named_at_once(ours, tiny_model):
    found = json.loads(data(ours.parent).read_text())
    data(ours.parent).write_text(json.dumps(found[:-1]))
    line = error_line(reproduced(ours, "--base_model", tiny_model("Mistral")), 2)
    for name in ("base_sha256", "data_sha256"):
        assert f"{name} was " in line


@pytest.mark.usefixtures("no_model_loads")
def test_rows_that_are_missing(ours):
    data(ours.parent).rename(ours.parent / "moved.json")
    line = error_line(reproduced(ours), 2)
    assert "rows.json: No such file or directory" in line or "no such file" in line
    assert "; name the rows of the run, of sha256 " in line
    assert line.endswith("with --data_path")


def test_rows_that_are_named(ours):
    data(ours.parent).rename(ours.parent / "moved.json")
    assert reproduced(ours, "--data_path", ours.parent / "moved.json").code == 0


@pytest.mark.usefixtures("no_model_loads")
def test_a_published_adapter_needs_its_base_and_rows_named(ours, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (ours / privacy.FILE).unlink()
    data(ours.parent).rename(ours.parent / "moved.json")
    line = error_line(reproduced(ours, "--base_model", "x"), 2)
    assert "name the rows of the run" in line
    line = error_line(reproduced(ours, "--data_path", ours.parent / "moved.json"), 1)
    assert "the base of " in line
    assert line.endswith("name it with --base_model")


# --------------------------------------------------------------------------------------------------------- tampering


@pytest.mark.usefixtures("no_model_loads")
def test_weights_that_were_changed(ours):
    path = ours / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    line = error_line(reproduced(ours), 1)
    assert line.startswith(f"error: {path}: not as it was saved (its sha256 is another)")


def test_an_option_that_was_changed_in_the_record(ours):
    edit_record(ours, lambda record: record["options"].update(learning_rate=0.021))
    line = error_line(reproduced(ours), 1)
    assert "made again on the same hardware with the same versions, it is another one (8 of 8 tensors differ" in line
    assert line.endswith("; its record, or the code, was changed after the run")


@pytest.mark.usefixtures("no_model_loads")
def test_an_option_that_holds_out_other_rows(ours):
    edit_record(ours, lambda record: record["options"].update(seed=8))
    line = error_line(reproduced(ours), 1)
    assert "others are held out or cut now: options in its record were changed after the run" in line


def test_other_versions_may_cut_otherwise(ours):
    edit_record(ours, lambda record: record.update(validation_sha256="0" * 64))
    edit_record(ours, lambda record: record["versions"].update(tokenizers="9.9"))
    result = reproduced(ours)
    assert result.code == 0
    assert "tokenizers was 9.9 and is " in result.out
    assert "the rows that are validated on give other tokens" in result.out


def test_a_loss_that_was_changed_in_the_record(ours):
    edit_record(ours, lambda record: record["result"]["history"][-1].update(validation_loss=0.1))
    line = error_line(reproduced(ours), 1)
    assert "(0 of 8 tensors differ" in line
    assert "validation loss differs first at step 3" in line


@pytest.mark.usefixtures("no_model_loads")
@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (lambda record: record["options"].update(lora_r="many"), 1, "options: damaged, lora_r is 'many'"),
        (lambda record: record.pop("template"), 1, "damaged, template is missing"),
        (lambda record: record["result"].update(history=3), 1, "damaged, result.history is 3"),
        (lambda record: record.update(status="running"), 1, "this run was never finished"),
        (lambda record: record.pop("run"), 1, "no folder of a run; name the output folder of finetune"),
        (lambda record: record.update(changes=["seed was 1 and is 2"]), 2, "changed when it was resumed (seed was 1"),
        (lambda record: record["plan"].update(token_budget="x"), 1, "plan: damaged, token_budget is 'x'"),
    ],
)
def test_a_record_that_nothing_can_be_made_from(ours, change, code, said):
    edit_record(ours, change)
    assert said in error_line(reproduced(ours), code)


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.usefixtures("no_model_loads")
def test_folders_that_are_refused(ours, tmp_path):
    for name in (ours, ours / "again", tmp_path):
        assert "is in " in error_line(reproduced(ours, "--output_dir", name), 2)
    assert "no run of ours is there" in error_line(run("reproduce", tmp_path / "none"), 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    line = error_line(reproduced(ours, "--output_dir", tmp_path / "other"), 2)
    assert "is not empty and was not made by lora_alpaca" in line


def test_code_of_a_base_is_run_only_where_it_is_named(ours):
    assert "name it too, with --base_model" in error_line(reproduced(ours, "--trust_remote_code"), 2)


def test_what_reaches_beyond_the_folder_is_not_taken_from_a_record(ours):
    reach = {
        "trust_remote_code": True, "cache_dir": "/nowhere", "report_to": "wandb", "wandb_project": "theirs",
        "export_dir": "/nowhere",
    }  # fmt: skip
    edit_record(ours, lambda record: (record["options"].update(reach), record["said"].extend(reach)))
    options = reproducing.options(ReproduceConfig(adapter=str(ours)), ours, reproducing.read(ours))
    assert not {"trust_remote_code", *reach} & (options.model_fields_set - {"trust_remote_code"})
    assert options.trust_remote_code is False


def test_what_is_of_the_hub_is_that_of_its_commit(ours):
    record = reproducing.read(ours) | {"base_model": "org/base", "base_revision": "abc", "base_is_local": False}
    record["options"] |= {"data_path": "org/rows,rows.json,org/other@main"}
    record |= {"data_revisions": {"org/rows": "0123", "org/other@main": "4567"}, "compute_dtype": "bf16"}
    record["options"]["dtype"] = "auto"
    options = reproducing.options(ReproduceConfig(adapter=str(ours)), ours, record)
    assert options.data_path == "org/rows@0123,rows.json,org/other@main"
    assert (options.base_model, options.revision, options.dtype) == ("org/base", "abc", "bf16")


def test_what_was_made_again_before_is_set_aside(ours):
    shutil.copytree(ours, ours.with_name("adapter-reproduced"))
    assert reproduced(ours).code == 0
    assert ours.with_name("adapter-reproduced.1").is_dir()


# ------------------------------------------------------------------------------------------------------- the record


def test_the_record_says_what_decides_the_numbers(ours):
    record = json.loads((ours / "lora_alpaca.json").read_text())
    assert {"python", "torch", "numpy", "peft", "bitsandbytes"} <= record["versions"].keys()
    assert record["hardware"]["threads"] >= 1
    assert record["hardware"]["instructions"]
    assert record["plan"]["total_steps"] == 3
    assert record["compute_dtype"] == "fp32"
    assert "working_directory" not in record
    assert json.loads((ours / privacy.FILE).read_text())["working_directory"].startswith("/")
    assert privacy.whole(ours, record)["working_directory"].startswith("/")


def test_a_run_that_was_changed_on_its_way_cannot_be_made_again(ours, tiny_llama):
    short_run.interrupt(ours, 2)
    words = ["--base_model", tiny_llama, "--data_path", data(ours.parent), "--output_dir", ours, "--max_steps", 4]
    done = run("finetune", "--config", ours / "lora_alpaca.json", *words, "--resume", "--allow_change", "max_steps")
    assert done.code == 0, done.err
    line = error_line(reproduced(ours), 2)
    assert "its options were changed when it was resumed (max_steps was 3 and is 4)" in line


def test_a_run_that_was_killed_and_resumed_is_made_again(ours, tiny_llama):
    short_run.interrupt(ours, 2)
    words = ["--base_model", tiny_llama, "--data_path", data(ours.parent), "--output_dir", ours, "--resume"]
    assert run("finetune", "--config", ours / "lora_alpaca.json", *words).code == 0
    assert reproduced(ours).code == 0
