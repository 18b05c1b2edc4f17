"""A finished run that is asked for again: as it was, nothing is done; otherwise what differs is listed, and refused."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from command import error_line, run
from folders import contents
from short_run import flags, interrupt

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.storage.output_folder import OutputFolder, read_record

WAS = re.compile(r"(\w+) was (.*?) and is ")


@pytest.fixture(scope="module")
def finished(tiny_llama, rows, tmp_path_factory):
    """Return the options of a run, and the folder that holds it finished; to be copied, not written to."""
    from conftest import as_row

    folder = tmp_path_factory.mktemp("finished")
    (folder / "rows.json").write_text(json.dumps([as_row(row) for row in rows]), encoding="utf-8")
    options = {
        "base_model": str(tiny_llama), "data_path": str(folder / "rows.json"), "output_dir": str(folder / "out"),
        "batch_size": 16, "num_epochs": 2, "save_steps": 2, "val_set_size": 4, "cutoff_len": 128, "dtype": "fp32",
        "load_8bit": False,
    }  # fmt: skip
    finetune(FinetuneConfig(**options))
    return options, folder


@pytest.fixture
def ours(finished, tmp_path):
    """Return the options of a finished run of this test's own."""
    options, folder = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    shutil.copy(folder / "rows.json", tmp_path / "rows.json")
    return options | {"output_dir": str(tmp_path / "out"), "data_path": str(tmp_path / "rows.json")}


def resumed(options, **changes):
    """Return how `--resume` with changed options ends, having touched nothing in the output folder."""
    folder = Path(options["output_dir"])
    before = contents(folder)
    result = run("finetune", *flags(options | changes), "--resume")
    assert contents(folder) == before
    return result


def listed(line):
    return [name for name, _ in WAS.findall(line)]


@pytest.mark.usefixtures("no_model_loads")
@pytest.mark.parametrize(
    "changes",
    [{}, {"logging_steps": 1, "save_steps": 1, "save_total_limit": 1}, {"max_dropped": 0.5}],
    ids=["nothing", "steps", "gate"],
)
def test_the_same_run_is_already_finished(ours, changes):
    result = resumed(ours, **changes)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == f"{ours['output_dir']}: this run is already finished"


@pytest.mark.usefixtures("no_model_loads")
def test_its_files_may_lie_in_another_place(ours, tmp_path):
    shutil.copytree(ours["base_model"], tmp_path / "moved")
    (tmp_path / "rows.json").rename(tmp_path / "renamed.json")
    moved = {"base_model": str(tmp_path / "moved"), "data_path": str(tmp_path / "renamed.json")}
    assert resumed(ours, **moved).code == 0


CHANGES = [
    ({"num_epochs": 4}, ["num_epochs"]),
    ({"max_steps": 20}, ["max_steps"]),
    ({"learning_rate": 0.1, "lora_dropout": 0.0}, ["learning_rate", "lora_dropout"]),
    ({"seed": 7}, ["seed"]),
    ({"val_set_size": 6}, ["val_set_size"]),
    ({"prompt_template_name": "vicuna"}, ["prompt_template_name", "prompt_template"]),
    ({"skip_bad_rows": True}, ["skip_bad_rows"]),
]


@pytest.mark.usefixtures("no_model_loads")
@pytest.mark.parametrize(("changes", "names"), CHANGES, ids=[names[0] for _, names in CHANGES])
@pytest.mark.parametrize("allowed", [False, True], ids=["plain", "allowed"])
def test_another_run_is_refused_and_the_way_on_is_named(ours, tmp_path, changes, names, allowed):
    words = {"allow_change": ",".join(names)} if allowed else {}
    line = error_line(resumed(ours, **changes, **words), 2)
    assert sorted(listed(line)) == sorted(names)
    assert f"--init_adapter {ours['output_dir']} --output_dir ANOTHER, without --resume" in line
    assert "its schedule is at its end" in line


@pytest.mark.usefixtures("no_model_loads")
def test_more_rows_are_another_run(ours, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), {"instruction": "Greet.", "output": "Hello."}]))
    assert listed(error_line(resumed(ours), 2)) == ["data_sha256"]  # the path is told from the folder on, and the same


@pytest.mark.usefixtures("no_model_loads")
@pytest.mark.parametrize(
    "changes",
    [{"lora_r": 64}, {"lora_alpha": 3}, {"lora_target_modules": "q_proj"}, {"base_model": "GPT2"}],
    ids=lambda changes: next(iter(changes)),
)
def test_where_its_adapter_cannot_be_trained_further_that_is_not_proposed(ours, tiny_model, changes):
    if "base_model" in changes:
        changes = {"base_model": str(tiny_model(changes["base_model"]))}
    line = error_line(resumed(ours, **changes), 2)
    assert next(iter(changes)) in listed(line)
    assert "--init_adapter" not in line
    assert "Begin the other run with --output_dir ANOTHER, without --resume" in line


@pytest.mark.usefixtures("no_model_loads")
def test_what_differs_is_what_differs_for_an_unfinished_run(ours, tmp_path):
    changes = {"num_epochs": 4, "learning_rate": 0.1, "seed": 7, "train_on_inputs": True}
    line = error_line(resumed(ours, **changes), 2)
    interrupt(tmp_path / "out", last_checkpoint=4)
    unfinished = error_line(run("finetune", *flags(ours | changes), "--resume"), 1)
    assert line.partition("(")[2].partition(")")[0] == unfinished.partition("(")[2].partition(")")[0]


def test_the_way_on_is_one(ours, tmp_path, capsys):
    another = {"init_adapter": ours["output_dir"], "output_dir": str(tmp_path / "another"), "num_epochs": 4}
    before = read_record(tmp_path / "out")["result"]["validation_loss"]
    result = finetune(FinetuneConfig(**ours | another))
    assert result.first_validation_loss == pytest.approx(before, rel=1e-5)
    assert result.steps == 12


@pytest.mark.usefixtures("no_model_loads")
def test_where_it_ran_is_only_told(ours, tmp_path):
    folder = OutputFolder(tmp_path / "out")
    folder.write_record(folder.record | {"ranks": 2, "precision": "unquantised base, bf16 compute on cuda"})
    result = resumed(ours)
    assert result.code == 0
    said = result.out.splitlines()[-1]
    assert "already finished; precision was 'unquantised base, bf16 compute on cuda' and is " in said
    assert said.endswith("ranks was 2 and is 1")


@pytest.mark.usefixtures("no_model_loads")
def test_a_record_of_before_an_option_has_its_default(ours, tmp_path):
    """What a version wrote that did not know an option is read as if its default had been said."""
    folder = OutputFolder(tmp_path / "out")
    record = folder.record
    del record["options"]["share_prefix"]
    folder.write_record(record)
    assert resumed(ours).code == 0
    assert listed(error_line(resumed(ours, share_prefix=False), 2)) == ["share_prefix"]


@pytest.mark.usefixtures("no_model_loads")
def test_an_exported_model_is_no_run(ours, tmp_path):
    OutputFolder(tmp_path / "out").write_record({"kind": "merged model", "status": "finished"})
    line = error_line(resumed(ours), 2)
    assert (
        line
        == f"error: --resume: {ours['output_dir']} holds a model that was exported, and no run; name another folder"
    )


@pytest.mark.usefixtures("no_model_loads")
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(ours, tmp_path, monkeypatch):
    """Of a finished run nothing is to be written, and of an unfinished one everything."""
    monkeypatch.setattr("os.access", lambda path, mode: mode == os.R_OK)
    assert resumed(ours).code == 0
    interrupt(tmp_path / "out", last_checkpoint=4)
    line = error_line(resumed(ours), 2)
    assert (
        line == f"error: --output_dir {ours['output_dir']}: {ours['output_dir']} is not writable; name another folder"
    )


@pytest.mark.parametrize("value", ["True", "true", "1"])
def test_a_checkpoint_is_named_by_its_folder(ours, value):
    """As transformers' Trainer takes it."""
    line = error_line(run("finetune", *flags(ours), "--resume_from_checkpoint", value), 2)
    assert line.endswith("it names a folder; the newest checkpoint in --output_dir is taken by --resume")
