"""A run within a budget of time or money: it ends in time, with its rate at its end, and all that comes after done."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import error_line, refused, run
from conftest import TORCHRUN
from short_run import Clock, flags, interrupt, same

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.errors import ConfigError, TrainingError
from lora_alpaca.planning.budget import Budget, Meter, process_start
from lora_alpaca.planning.plan import Plan
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.output_folder import remove_checkpoint
from lora_alpaca.training import command
from lora_alpaca.training.budget.countdown import Countdown
from lora_alpaca.training.finetuning import train
from lora_alpaca.training.state import TrainState

MINUTE = 60.0


@pytest.fixture
def options(tiny_llama, data_path, tmp_path):
    """Return the flags of a run of 3 steps an epoch, which says every rate."""
    return {
        "base_model": str(tiny_llama), "data_path": str(data_path), "output_dir": str(tmp_path / "out"),
        "batch_size": 16, "val_set_size": 4, "learning_rate": 1e-2, "cutoff_len": 128, "dtype": "fp32",
        "load_8bit": False, "logging_steps": 1, "report": False,
    }  # fmt: skip


def timed(options, clock=None, **more):
    """Return the result of a run on a clock that began with it, and that clock."""
    config, clock = FinetuneConfig(**options | more), clock or Clock()
    return train(config, None, meter=Meter(Budget.of(config), 0.0, clock)), clock


def stopped(folder):
    """Leave a finished folder as one of a run that was stopped at its second checkpoint, and return that step."""
    numbers = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    for number in numbers[2:]:
        remove_checkpoint(folder / f"checkpoint-{number}")
    interrupt(folder, last_checkpoint=numbers[1])
    return numbers[1]


def rates(result):
    return [entry["learning_rate"] for entry in result.history if "learning_rate" in entry]


def test_minutes_alone_are_filled_with_epochs_and_the_rate_ends_with_them(options, tmp_path, capsys):
    result, clock = timed(options, max_minutes=1)
    assert 0.8 * MINUTE < clock.seconds <= MINUTE
    found = rates(result)
    assert result.steps == len(found) > 9  # three epochs are no end
    assert found.index(max(found)) <= len(found) / 3 and max(found) > 0.9e-2
    assert all(later <= 1.1 * earlier for earlier, later in pairwise(found[4:]))  # some steps are timed by then
    assert found[-1] < 1.5 / (len(found) - 2) * max(found)  # as that of the last of so many steps
    assert read_json(tmp_path / "out" / "lora_alpaca.json")["status"] == "finished"
    validated = [entry["step"] for entry in result.history if "validation_loss" in entry]
    assert validated[-1] == result.steps and 2 <= len(validated) <= 6
    said = capsys.readouterr().out
    assert "or as many as --max_minutes 1 leaves time for" in said
    assert f"are used, for {result.steps} steps, {result.steps / 3:.1f} epochs; what is left is for validation" in said


def test_money_ends_a_run_as_its_minutes_would(options, capsys):
    """One of something a minute, and ten thousand epochs."""
    result, clock = timed(options, max_cost=1, price_per_hour=60, num_epochs=10_000)
    assert 0.8 * MINUTE < clock.seconds <= MINUTE
    assert rates(result)[-1] < 0.3 * 1e-2
    said = capsys.readouterr().out
    assert "--max_cost 1 are used" in said
    spent = [float(line.split(", ")[-1].removesuffix(" spent")) for line in said.splitlines() if " spent" in line]
    assert spent == sorted(spent) and 0 < spent[0] < spent[-1] <= 1


@pytest.mark.parametrize(("held_out", "basis"), [(4, "this validation"), (0, "the first step")])
def test_time_and_money_are_told_before_or_after_the_first_step(options, capsys, held_out, basis):
    timed(options, max_steps=4, val_set_size=held_out, price_per_hour=36)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time: ")]
    assert len(said) == 1 and said[0].endswith(f" steps, by {basis}")
    found = re.fullmatch(r"time: about (?:(\d+) min )?(\d+) s, ([\d.]+) at 36 an hour for \d+ steps, by .*", said[0])
    assert found, said
    seconds = 60 * int(found[1] or 0) + int(found[2])
    assert float(found[3]) == pytest.approx(seconds / 100, abs=0.01)


def test_cost_alone_is_a_limit_and_no_length(options):
    """Nobody asks to pay more than three epochs cost."""
    result, _ = timed(options, max_cost=0.1, price_per_hour=1)
    assert result.steps == 9


@pytest.mark.parametrize("length", [{"num_epochs": 1}, {"max_steps": 5}])
def test_a_budget_that_is_not_used_up_changes_nothing(options, tmp_path, length):
    within, _ = timed(options, max_minutes=1000, **length)
    without = finetune(FinetuneConfig(**options | length | {"output_dir": str(tmp_path / "without")}))
    assert same(tmp_path / "out", tmp_path / "without")
    assert within.steps == without.steps and rates(within) == rates(without)


def test_whatever_is_first_ends_the_run(options, capsys):
    result, clock = timed(options, max_minutes=1, num_epochs=1000)
    assert result.steps < 1000 and clock.seconds <= MINUTE and rates(result)[-1] < 0.3 * 1e-2
    assert "fit into --max_minutes 1; " in capsys.readouterr().out
    result, _ = timed(options | {"output_dir": options["output_dir"] + "2"}, max_minutes=1, max_steps=5)
    assert result.steps == 5
    assert "time: the 5 steps will end before --max_minutes 1; " in capsys.readouterr().out


def test_long_steps_are_not_begun_when_they_would_end_late(options):
    """Of seconds at which one step more would end after the minute, what is kept for saving included."""
    result, clock = timed(options, Clock(tick=1.75), max_minutes=1, val_set_size=0)
    assert 2 <= result.steps <= 8 and 0.7 * MINUTE < clock.seconds <= MINUTE


@pytest.mark.parametrize("extra", [{"val_set_size": 0}, {"report": True}, {"eval_steps": 2, "save_steps": 2},
                                   {"early_stopping_patience": 1, "learning_rate": 0.9}])  # fmt: skip
def test_with_other_work_between_the_steps(options, extra):
    result, clock = timed(options, max_minutes=0.5, **extra)
    assert result.steps >= 2 and clock.seconds <= 0.5 * MINUTE + 1


# ------------------------------------------------------------------------------------------------------------- resume


def test_a_run_that_resumes_counts_on(options, tmp_path, capsys):
    timed(options, max_minutes=1, save_steps=4, eval_steps=4)
    at = stopped(tmp_path / "out")
    facts = read_json(tmp_path / "out" / f"checkpoint-{at}" / "state.json")["progress"]
    assert facts["step"] == at and 0 < facts["first_step_at"] < facts["used"] < MINUTE
    result, clock = timed(options, max_minutes=1, save_steps=4, eval_steps=4, resume=True)
    assert clock.seconds + facts["used"] <= MINUTE
    assert result.steps > at and rates(result)[-1] < 0.3 * 1e-2
    assert max(rates(result)[at:]) <= min(rates(result)[at - 2 : at]) + 1e-6  # it goes on where it was


def test_a_budget_that_is_used_up_ends_with_validation_and_save(options, tmp_path, capsys):
    timed(options, max_minutes=1, save_steps=4)
    at = stopped(tmp_path / "out")
    capsys.readouterr()
    result, _ = timed(options, Clock(seconds=2 * MINUTE), max_minutes=1, save_steps=4, resume=True)
    said = capsys.readouterr().out
    assert result.steps == at and f"of --max_minutes 1 are used, for {at} steps" in said
    assert read_json(tmp_path / "out" / "lora_alpaca.json")["status"] == "finished"


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_a_budget_that_the_start_takes_is_refused_before_the_load(options, no_model_loads):
    with pytest.raises(ConfigError, match=r"--max_minutes 0\.5: 1 min \d+ s have gone by before the base is loaded"):
        timed(options, Clock(seconds=MINUTE), max_minutes=0.5)


def test_a_budget_without_room_for_a_step_is_refused(options, tmp_path):
    with pytest.raises(TrainingError, match=r"--max_minutes 0\.05: .* kept for validation.* not one step fits; give"):
        timed(options, max_minutes=0.05)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_cost_needs_a_price():
    assert "--max_cost 2: say what an hour costs with --price_per_hour" in refused("finetune", "--max_cost", "2")


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_the_rate_of_a_time_between_two_steps():
    config = FinetuneConfig(learning_rate=1.0)
    plan = Plan(total_steps=10, warmup_steps=2, eval_steps=1, save_steps=1, micro_batch_size=1)
    places = [0, 0.5, 1, 1.5, 2, 2.5, 6, 9.5]
    found = [plan.learning_rate(place, config) for place in places]
    assert found == pytest.approx([0.5, 0.75, 1, 1, 1, 7.5 / 8, 0.5, 0.5 / 8])


def test_seconds_and_money():
    budget = Budget.of(FinetuneConfig(max_minutes=10, max_cost=3, price_per_hour=60))
    meter = Meter(budget, 5.0, Clock(tick=0, seconds=65.0))
    assert (meter.used(), meter.spent(), meter.left(), budget.in_seconds) == (60.0, 1.0, 120.0, 180.0)
    meter.resume(100.0, 0.5)  # at another price
    assert (meter.used(), meter.spent(), meter.left()) == (160.0, 1.5, 90.0)
    assert str(budget) == "--max_minutes 10 and --max_cost 3"
    assert Meter(Budget(), 0.0, Clock()).spent() is None


def outlook(seconds, **timings):
    """Return what is allowed with so many seconds left of a minute, before a step of ten tokens."""
    state = TrainState(step=5, first_step_at=10.0, timings={"checkpoint": 1.0, **timings})
    meter = Meter(Budget(seconds=MINUTE), 0.0, Clock(tick=0.0, seconds=MINUTE - seconds))
    ending = {"saving": 1.0, "report": 0.0, "export": 0.0}
    return Countdown(meter, SimpleNamespace(broadcast=lambda decide: decide()), state, 10.0, ending).look(10, 100)


def test_what_a_time_allows():
    """A step takes ten seconds; two are kept free, one and a tenth for saving."""
    assert not outlook(14.0, token=1.0).allows_step  # 14 - 2 - 1.1 < 1.1 * 10
    assert outlook(14.2, token=1.0).allows_step
    assert not outlook(19.0, token=1.0, validation=5.0).allows_step
    assert outlook(19.7, token=1.0, validation=5.0).allows_step
    assert not outlook(25.0, token=1.0, validation=5.0).allows_validation  # 19.6 + 1.1 * (5 + 1)
    assert outlook(26.3, token=1.0, validation=5.0).allows_validation
    assert not outlook(15.1, token=1.0).allows_checkpoint and outlook(15.3, token=1.0).allows_checkpoint
    assert outlook(14.2, **{"pass": 1 / 3}).allows_step and not outlook(14.0, **{"pass": 1 / 3}).allows_step
    assert outlook(2.0).share > outlook(40.0).share > 0


def test_a_command_counts_from_the_start_of_its_process(monkeypatch):
    """And a call from the call."""
    meters = []
    monkeypatch.setattr("lora_alpaca.training.finetuning.train", lambda config, rows, meter=None: meters.append(meter))
    for function in (command, finetune):
        function(FinetuneConfig())
    assert meters[0].used() >= meters[1].used() + 0.1
    program = "import time; from lora_alpaca.planning.budget import process_start; print(-process_start())"
    program = program.replace("-process_start()", "time.perf_counter() - process_start()")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.01 < float(done.stdout) < 60
    assert process_start() < -float(done.stdout) + process_start() + 60


# -------------------------------------------------------------------------------------------------------------- export


def test_a_command_exports_what_it_has_trained(options, tmp_path):
    where = tmp_path / "merged"
    result = run("finetune", *flags(options | {"max_steps": 2, "learning_rate": 0.1}), "--export_dir", where)
    assert result.code == 0, result.err
    assert (where / "model.safetensors").is_file()
    assert f"saved in {where}" in result.out


@pytest.mark.parametrize("what", ["folder", "file", "output"])
def test_a_folder_for_an_export_that_is_there(options, tmp_path, what, no_model_loads):
    where = tmp_path / "merged"
    if what == "folder":
        (where / "theirs").mkdir(parents=True)
    elif what == "file":
        where.write_text("theirs")
    else:
        where = options["output_dir"]
    line = error_line(run("finetune", *flags(options), "--overwrite", "--export_dir", where), 2)
    assert f"--export_dir {where} is " in line
    assert not Path(options["output_dir"]).exists()


# --------------------------------------------------------------------------------------------------------------- ranks


def test_ranks_whose_clocks_differ_take_the_same_steps(options, tmp_path):
    """The second rank's clock goes three times as fast; what the first one decides counts."""
    program = Path(__file__).with_name("budget_ranks.py")
    done = subprocess.run([*TORCHRUN, program, json.dumps(options), tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["steps"] > 5 and found[0]["rates"][-1] < 0.2 * max(found[0]["rates"])
