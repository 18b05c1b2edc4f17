"""`--val_data_path`: rows of one's own to validate on, which are part of what a run is."""

import json
import re
import shutil

import pytest
from command import error_line, refused, run
from conftest import as_row
from short_run import flags, interrupt

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.planning.recipes import fill_defaults
from lora_alpaca.storage.output_folder import read_record
from lora_alpaca.training.reading import read_rows

OURS = [{"instruction": f"Greet number {number}.", "output": f"Hello, {number}."} for number in range(6)]
NUMBERS = {
    "batch_size": 4, "max_steps": 6, "save_steps": 2, "eval_steps": 3, "cutoff_len": 128, "dtype": "fp32",
    "load_8bit": False, "logging_steps": 1,
}  # fmt: skip


def written(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def options(tiny_llama, data_path, tmp_path):
    """Return the options of a run of 6 steps with a validation file of six rows."""
    paths = {"data_path": str(data_path), "val_data_path": written(tmp_path / "val.json", OURS)}
    return {"base_model": str(tiny_llama), "output_dir": str(tmp_path / "out")} | paths | NUMBERS


def test_all_rows_are_trained_on_and_the_file_is_validated_on(options, tmp_path, capsys):
    ours = finetune(FinetuneConfig(**options))
    assert f"validation data: {options['val_data_path']}, sha256 " in capsys.readouterr().out
    record = read_record(tmp_path / "out")
    assert (record["ledger"]["train"], record["ledger"]["validation"], record["ledger"]["read"]) == (48, 6, 54)
    assert [entry["step"] for entry in ours.history if "validation_loss" in entry] == [3, 6]
    without = options | {"val_data_path": "", "val_set_size": 0, "output_dir": str(tmp_path / "without")}
    none = finetune(FinetuneConfig(**without))
    losses = [[entry["loss"] for entry in result.history if "loss" in entry] for result in (ours, none)]
    assert losses[0] == losses[1]  # which rows are trained on, and in what order, does not depend on the file
    assert ours.first_validation_loss is not None
    assert read_record(tmp_path / "without")["val_data_sha256"] is None


@pytest.mark.usefixtures("no_model_loads")
def test_rows_that_are_trained_on_too_are_counted_and_warned_of(options, tmp_path, rows):
    shared = [as_row(rows[3]), as_row(rows[7])]
    words = flags(options | {"val_data_path": written(tmp_path / "val.json", [*OURS, *shared]), "max_duplicates": 0.0})
    line = error_line(run("finetune", *words), 2)
    assert "2 of 56 rows (3.6%) are in both the training and the validation part (first: val.json:7)" in line


@pytest.mark.parametrize("size", [0, 5, 0.1])
def test_both_flags_for_it_are_refused(options, size):
    line = refused("finetune", *flags(options | {"val_set_size": size}))
    assert line == (
        f"error: --val_set_size {size} holds out rows of --data_path, and --val_data_path {options['val_data_path']} "
        "names 6 rows to validate on; leave one of the two out"
    )


def test_the_same_number_twice_is_no_contradiction(options):
    assert len(read_rows(FinetuneConfig(**options, val_set_size=6)).validation) == 6


@pytest.mark.parametrize("name", ["nowhere.json", "rows.docx", "./folder", "no/such/id/at/all"])
def test_a_file_that_is_not_there_is_named_by_its_own_flag(options, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused("finetune", *flags(options | {"val_data_path": name}))
    assert "val_data_path" in line or line.startswith(f"error: {name}: ")
    assert " --data_path" not in line


def test_its_rows_are_read_as_those_of_the_data(options, tmp_path, rows):
    """The same --columns and --skip_bad_rows."""
    named = [{"ask": row["instruction"], "output": row["output"]} for row in OURS]
    path = written(tmp_path / "val.json", [*named, {"ask": "No answer."}])
    data = written(tmp_path / "data.json", [{"ask": row.question.text, "output": row.answers[0]} for row in rows])
    named_so = {"data_path": data, "val_data_path": path, "columns": "instruction=ask"}
    assert refused("finetune", *flags(options | named_so)).startswith("error: val.json:7: ")
    found = read_rows(FinetuneConfig(**options | named_so, skip_bad_rows=True)).validation
    assert (len(found), [where for where, _ in found.dropped]) == (6, ["val.json:7"])


@pytest.mark.usefixtures("no_model_loads")
def test_a_file_of_which_nothing_is_left_is_an_error(options, tmp_path):
    long = [{"instruction": "word " * 300, "output": "Yes."}]
    line = error_line(run("finetune", *flags(options | {"val_data_path": written(tmp_path / "val.json", long)})), 2)
    assert "val.json: at --cutoff_len 128 no row of it has an answer to validate on" in line


def test_an_output_folder_that_holds_it_is_refused(options, tmp_path):
    (tmp_path / "out").mkdir()
    path = written(tmp_path / "out" / "val.json", OURS)
    line = refused("finetune", *flags(options | {"val_data_path": path}))
    assert f"--output_dir {tmp_path / 'out'} is, or holds, --val_data_path {path}" in line


@pytest.fixture(scope="module")
def finished(tiny_llama, rows, tmp_path_factory):
    """Return the folder of a run as `options` describes it, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    paths = {"data_path": written(folder / "rows.json", list(map(as_row, rows)))}
    paths |= {"val_data_path": written(folder / "val.json", OURS), "output_dir": str(folder / "out")}
    finetune(FinetuneConfig(base_model=str(tiny_llama), **paths, **NUMBERS))
    return folder / "out"


@pytest.mark.parametrize("change", ["another", "none", "new rows in it"])
@pytest.mark.parametrize("status", ["finished", "unfinished"])
def test_another_file_is_another_run_and_the_same_one_elsewhere_is_not(options, finished, tmp_path, status, change):
    shutil.copytree(finished, tmp_path / "out")
    if status == "unfinished":
        interrupt(tmp_path / "out", last_checkpoint=4)
    other, names = dict(options), ["val_data_path", "val_data_sha256"]
    if change == "another":
        other["val_data_path"] = written(tmp_path / "other.json", OURS[:3])
    elif change == "none":
        other["val_data_path"] = ""
    else:
        written(tmp_path / "val.json", OURS[:3])
        names = names[1:] if status == "finished" else names  # its record tells the path from the folder on: the same
    line = error_line(run("finetune", *flags(other), "--resume"), 2 if status == "finished" else 1)
    assert sorted(re.findall(r"(\w+) was .*? and is ", line)) == names
    moved = options | {"val_data_path": written(tmp_path / "moved.json", OURS)}
    result = run("finetune", *flags(moved), "--resume")
    assert result.code == 0
    assert ("already finished" if status == "finished" else "resuming from") in result.out
    if status == "unfinished":  # it is allowed by name, and is in effect
        interrupt(tmp_path / "out", last_checkpoint=4)
        allowed = run("finetune", *flags(other), "--resume", "--allow_change", ",".join(names))
        assert allowed.code == 0, allowed.err
        assert read_record(tmp_path / "out")["ledger"]["validation"] == (4 if change == "none" else 3)


def test_the_demo_keeps_no_size_for_it():
    config, _ = fill_defaults(FinetuneConfig(val_data_path="demo"), world_size=1)
    assert config.val_set_size is None
    assert fill_defaults(FinetuneConfig(), world_size=1)[0].val_set_size is not None


def test_prepared_rows_are_kept_for_both_files(options, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_alpaca.data.cache.CACHED_FROM", 50)  # 48 rows and 6
    words = flags(options | {"cache_dir": str(tmp_path / "cache"), "max_steps": 1, "overwrite": True})
    assert "prepared rows found" not in run("finetune", *words).out
    assert "prepared rows found" in run("finetune", *words).out
    written(tmp_path / "val.json", OURS[::-1])
    assert "prepared rows found" not in run("finetune", *words).out
