"""`reproduce` of runs of every kind: each is made again bit for bit, or it is told in one line why it is not."""

import json
import shutil
import subprocess

import pytest
import short_run
from command import error_line, run
from conftest import TORCHRUN, as_row
from short_run import Clock

from lora_alpaca import FinetuneConfig
from lora_alpaca.planning.budget import Budget, Meter
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.training.finetuning import train


@pytest.fixture
def options(tiny_llama, rows, tmp_path):
    """Return the options of a short run into `run`."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([as_row(row) for row in rows[:40]]))
    return {
        "base_model": str(tiny_llama), "data_path": str(path), "output_dir": str(tmp_path / "run"), "batch_size": 4,
        "max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "val_set_size": 4, "learning_rate": 1e-2,
        "cutoff_len": 128, "dtype": "fp32", "load_8bit": False, "device": "cpu", "report": False,
        "save_total_limit": 9,
    }  # fmt: skip


def trained(options, **more):
    """Return the folder of a run by the command."""
    chosen = {name: value for name, value in (options | more).items() if value is not None}
    done = run("finetune", *short_run.flags(chosen))
    assert done.code == 0, done.err
    return done


def made_again(folder, *words):
    """Return what `reproduce` said of a folder, of which it made the same bits."""
    done = run("reproduce", folder, *words)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].endswith(": identical"), done.out
    return done.out


def record(folder):
    return read_json(folder / "lora_alpaca.json")


# ------------------------------------------------------------------------------------------------------------- budget


def timed(options, minutes, **more):
    """Return the folder of a run within some minutes of a clock that goes on by half a second at each look."""
    config = FinetuneConfig(**{**options, "max_steps": None, "max_minutes": minutes, **more})
    return train(config, None, meter=Meter(Budget.of(config), 0.0, Clock())).output_dir


@pytest.mark.parametrize("more", [{}, {"eval_steps": None, "logging_steps": 10}, {"val_set_size": 0}], ids=str)
def test_a_run_that_its_time_ended_is_made_again_at_the_same_rates(options, more, tmp_path):
    folder = timed(options, 1, **more)
    then = record(folder)
    assert then["result"]["steps"] == len(then["plan"]["rates"]) == then["plan"]["total_steps"] > 9
    said = made_again(folder)
    assert "hardware and versions are those recorded: the result has to be the same, bit for bit" in said
    assert "leaves time for" not in said
    again = record(tmp_path / "run-reproduced")
    assert again["options"]["max_minutes"] is None
    assert again["plan"]["rates"] == then["plan"]["rates"]
    made_again(tmp_path / "run-reproduced")


def test_a_run_that_resumed_within_its_time_is_made_again(options):
    folder = timed(options, 1, save_steps=4, eval_steps=4)
    short_run.interrupt(folder, 4)
    config = FinetuneConfig(**options | {"max_steps": None, "max_minutes": 1, "resume": True})
    config = config.model_copy(update={"save_steps": 4, "eval_steps": 4})
    train(config, None, meter=Meter(Budget.of(config), 0.0, Clock()))
    made_again(folder)


def test_a_run_that_its_money_ended_is_made_again(options):
    made_again(timed(options, None, max_cost=1, price_per_hour=60, num_epochs=1000))


@pytest.mark.parametrize("rates", [None, [1e-3]])
def test_rates_that_were_not_recorded_cannot_be_had_again(options, rates):
    folder = timed(options, 0.3)
    found = record(folder)
    found["plan"].pop("rates")
    found["plan"] |= {"rates": rates} if rates else {}
    (folder / "lora_alpaca.json").write_text(json.dumps(found))
    line = error_line(run("reproduce", folder), 2)
    assert not folder.with_name("run-reproduced").exists()
    assert "its steps and their rates were decided by the time that they took (--max_minutes), and its record" in line


# ------------------------------------------------------------------------------------------------------------- a rate


@pytest.mark.slow
def test_a_rate_that_was_found_is_not_sought_again(options, tmp_path):
    trained(options, learning_rate="auto")
    assert "search of the learning rate" not in made_again(tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ hidden states


def test_hidden_states_are_read_again_and_computed_again(options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(options, layers="top:1", cache_hidden=True)
    assert record(tmp_path / "run")["plan"]["reads_hidden"] is True
    assert "found in" in made_again(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    assert "computed in" in made_again(tmp_path / "run")


def test_hidden_states_that_were_not_read_are_not(options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(options, layers="top:1", cache_hidden=True, cache_dir="none")
    assert record(tmp_path / "run")["plan"]["reads_hidden"] is False
    said = made_again(tmp_path / "run")
    assert "--cache_hidden: every layer is computed in every step, as when the run began" in said


def test_hidden_states_that_cannot_be_read_again(options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trained(options, layers="top:1", cache_hidden=True)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    line = error_line(run("reproduce", tmp_path / "run"), 2)
    assert line.startswith("error: --cache_hidden: ")
    assert "hidden states were read when the run began" in line
    assert not (tmp_path / "run-reproduced").exists()


# ------------------------------------------------------------------------------------------------------------ resumed


def test_a_run_that_was_resumed_elsewhere_is_told(options, tmp_path):
    trained(options)
    short_run.interrupt(tmp_path / "run", 2)

    def elsewhere(facts):
        facts["record"]["hardware"]["threads"], facts["record"]["versions"]["torch"] = 64, "1.0"

    short_run.change_state(tmp_path / "run" / "checkpoint-2", elsewhere)
    said = trained(options, resume=True, threads=1).out
    assert "not as when the run began: torch was 1.0 and is 2." in said
    assert "threads was 64 and is 1: from here on, sums may be rounded otherwise" in said
    said = made_again(tmp_path / "run")
    assert "not as recorded: it was resumed elsewhere (torch was 1.0 and is 2." in said
    assert "the same, bit for bit\n" not in said.partition("loss")[0]


# -------------------------------------------------------------------------------------------------------------- ranks


def launched(*words):
    return subprocess.run([*TORCHRUN, "-m", "lora_alpaca", *map(str, words)], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tune": "full", "learning_rate": 1e-3, "load_8bit": None},
        {"tune": "full", "shard": "full", "load_8bit": None},
        {"max_minutes": 1, "max_steps": None, "num_epochs": 1},
    ],
    ids=str,
)
def test_a_run_of_two_ranks_is_made_again_by_two(options, more, tmp_path):
    chosen = {name: value for name, value in (options | more).items() if value is not None}
    done = launched("finetune", *short_run.flags(chosen))
    assert done.returncode == 0, done.stderr
    done = launched("reproduce", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(": identical")


@pytest.mark.slow
def test_a_run_of_two_ranks_is_another_one_by_one(options, tmp_path):
    """Each draws its own dropout."""
    trained(options, processes=2, lora_dropout=0.5)
    done = run("reproduce", tmp_path / "run", "--tolerance", "1")
    assert done.code == 0, done.err
    told = "ranks was 2 and is 1 (each draws its own dropout; torchrun --nproc_per_node=2 -m lora_alpaca reproduce"
    assert told in done.out
    line = error_line(run("reproduce", tmp_path / "run", "--tolerance", "0", "--overwrite"), 1)
    assert told in line and line.endswith("and a validation loss by more than --tolerance 0")
