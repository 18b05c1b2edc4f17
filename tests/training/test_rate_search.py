"""--learning_rate auto and find_lr: what is found is the rate of the run, is recorded, and is not sought again."""

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import short_run
import torch
from command import error_line, refused, run
from conftest import TORCHRUN

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import ConfigError, TrainingError
from lora_alpaca.planning import halving
from lora_alpaca.planning.budget import Budget, Meter
from lora_alpaca.planning.plan import resolve_steps
from lora_alpaca.storage import output_folder
from lora_alpaca.training.finetuning import train
from lora_alpaca.training.search import rate_search
from lora_alpaca.training.search.trials import Trials
from lora_alpaca.training.step import Evaluation, Step

BITS = ["--dtype", "fp32", "--load_8bit", "False", "--device", "cpu"]


@pytest.fixture
def words(tiny_llama, data_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BASE_MODEL", raising=False)
    sizes = ["--max_steps", "4", "--batch_size", "4", "--val_set_size", "4", "--cutoff_len", "96", "--save_steps", "2"]
    return ["--base_model", tiny_llama, "--data_path", data_path, *sizes, *BITS]


def record(folder):
    return output_folder.read_record(folder)


@pytest.mark.slow
def test_a_run_with_a_rate_that_was_found_is_that_with_the_rate_said(words, tmp_path):
    found = run("finetune", *words, "--learning_rate", "auto", "--output_dir", "found")
    assert found.code == 0, found.err
    kept = record(tmp_path / "found")
    rate = kept["options"]["learning_rate"]
    assert rate == kept["rate_search"]["rate"] > 0
    assert len(kept["rate_search"]["trials"]) == 14
    assert found.out.index("search of the learning rate: 8 rates x ") < found.out.index(f"learning rate {rate:g}: ")
    assert found.out.index(f"learning rate {rate:g}: ") < found.out.index("before the first step")
    said = run("finetune", *words, "--learning_rate", rate, "--output_dir", "said")
    assert said.code == 0, said.err
    assert short_run.same(tmp_path / "found", tmp_path / "said"), "the search left something behind"
    svg, page = ((tmp_path / "found" / name).read_text() for name in ("learning_rate.svg", "report.html"))
    assert "<svg" in svg and "var(--" not in svg
    assert "Search of the learning rate" in page
    assert not (tmp_path / "said/learning_rate.svg").exists()

    short_run.interrupt(tmp_path / "found", 2)
    resumed = run("finetune", *words, "--learning_rate", "auto", "--output_dir", "found", "--resume")
    assert resumed.code == 0, resumed.err
    assert "search of the learning rate" not in resumed.out
    assert short_run.same(tmp_path / "found", tmp_path / "said")
    assert record(tmp_path / "found")["rate_search"] == kept["rate_search"]
    again = run("finetune", *words, "--learning_rate", "auto", "--output_dir", "found", "--resume")
    assert "this run is already finished" in again.out


def test_without_validation_rows_some_of_the_others_judge(words):
    at = words.index("--val_set_size") + 1
    found = run("find_lr", *words[:at], "0", *words[at + 1 :])
    assert found.code == 0, found.err
    assert "say --learning_rate " in found.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "bits", [["--load_8bit"], ["--load_4bit"], ["--tune", "full"], ["--tune", "full", "--layers", "top:1"]], ids=str
)
def test_whatever_is_trained_has_a_rate(words, bits):
    kept = words[: words.index("--dtype")]
    found = run("find_lr", *kept, "--dtype", "fp32", "--device", "cpu", *bits)
    assert found.code == 0, found.err
    table = found.out.splitlines()
    table = table[next(number for number, line in enumerate(table) if line.startswith("     rate")) + 1 :][:8]
    rates = [float(line.split()[0]) for line in table]
    grid = halving.GRID["full" if "full" in bits else "lora"]
    assert rates == pytest.approx(list(grid), rel=0.05)
    assert grid[0] / 100 < float(found.out.splitlines()[-1].removeprefix("say --learning_rate ")) < 1.05 * grid[-1]


# ------------------------------------------------------------------------------------------------------------- a budget


@pytest.mark.parametrize("limit", [["--max_minutes", "0.0001"], ["--find_lr_minutes", "0.0001"]], ids=str)
def test_a_time_in_which_not_every_rate_can_be_tried_is_refused(words, limit):
    line = error_line(run("find_lr", *words, *limit), 2)
    assert f"{' '.join(limit)}: a search of the learning rate may take 0 s then, and takes about " in line
    assert line.endswith("at the least; give more, or name a --learning_rate")


@pytest.mark.slow
def test_a_run_within_a_time_finds_its_rate_and_ends_in_time(words, tmp_path):
    options = {word.removeprefix("--"): str(value) for word, value in zip(words[::2], words[1::2], strict=True)}
    options |= {"learning_rate": "auto", "max_steps": None, "max_minutes": 2, "output_dir": "found", "logging_steps": 1}
    config, clock = FinetuneConfig(**options), short_run.Clock()
    result = train(config, None, meter=Meter(Budget.of(config), 0.0, clock))
    kept = record(tmp_path / "found")
    rates = [entry["learning_rate"] for entry in result.history if "learning_rate" in entry]
    assert 96 < clock.seconds <= 120
    assert 0.9 * kept["rate_search"]["rate"] < max(rates) <= kept["rate_search"]["rate"]
    assert rates[-1] < 0.3 * max(rates)
    again = run("reproduce", "found")
    assert again.out.splitlines()[-1].endswith(": identical"), again


@pytest.mark.slow
def test_ranks_whose_clocks_differ_find_the_same_rate(words, tmp_path):
    """The second rank's clock goes three times as fast, and its time is over before that of the first."""
    options = {word.removeprefix("--"): str(value) for word, value in zip(words[::2], words[1::2], strict=True)}
    del options["load_8bit"]
    kinds = [{"load_8bit": "False"}, {"load_8bit": "True"}, {"load_4bit": "True"}, {"tune": "full"},
             {"tune": "full", "shard": "full"}, {"load_8bit": "False", "find_lr_minutes": "0.05"}]  # fmt: skip
    program = Path(__file__).with_name("rate_ranks.py")
    runs = json.dumps([options | kind for kind in kinds])
    done = subprocess.run([*TORCHRUN, program, runs, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert [len(one["trials"]) for one in found[0]][:-1] == [14] * 5


# --------------------------------------------------------------------------------------------------------------- trials


def test_the_command_writes_nothing_but_the_curve_it_is_asked_for(words, tmp_path):
    before = sorted(tmp_path.iterdir())
    found = run("find_lr", *words, "--svg", "curve.svg")
    assert found.code == 0, found.err
    assert sorted({*tmp_path.iterdir()} - {*before}) == [tmp_path / "curve.svg"]
    last = found.out.splitlines()[-1]
    rate = float(last.removeprefix("say --learning_rate "))
    assert halving.GRID["lora"][0] / 100 < rate < 1.05 * halving.GRID["lora"][-1]
    assert "is there already" in run("find_lr", *words, "--svg", "curve.svg").err


class Learner:
    """What a trial asks of a stepper: one weight, which each step moves by its rate, until the loss is no number."""

    def __init__(self, diverges_at, fails_at=math.inf):
        self.parameters = [torch.nn.Parameter(torch.zeros(3))]
        self.optimizer = torch.optim.AdamW(self.parameters)
        self.strategy = SimpleNamespace(forget_gathered=lambda: None)
        self.world = SimpleNamespace(scaler=None, seed=lambda seed, step: None)
        self.diverges_at, self.fails_at, self.rates = diverges_at, fails_at, []

    def step(self, rows, rate):
        self.rates.append(rate)
        self.optimizer.state[self.parameters[0]] = {"step": torch.ones(())}
        with torch.no_grad():
            self.parameters[0] += rate
        return Step(math.nan if self.parameters[0][0].item() > self.diverges_at else 1.0, 1.0, 1, 1)

    def evaluate(self, rows):
        if self.parameters[0][0].item() > self.fails_at:
            raise TrainingError("the validation loss is nan")
        return Evaluation(1 - self.parameters[0][0].item(), [], 0.0)


def test_a_trial_is_complete_leaves_nothing_and_is_infinite_where_it_diverges():
    config = FinetuneConfig(max_steps=100, warmup_steps=50, batch_size=1)
    plan = resolve_steps(config, 10, 1)
    learner = Learner(diverges_at=0.9, fails_at=0.5)
    trials = Trials(learner, plan, config, [object()] * 3, [object()])
    assert 0.5 < trials.loss(0.1, 4, 2) < 1
    assert learner.rates == pytest.approx([0.05, 0.1, 0.1, 0.05]), "half of it warm-up, as in the run"
    assert not learner.parameters[0].any() and not learner.optimizer.state
    assert trials.loss(0.3, 4, 2) == math.inf, "validation failed"
    assert trials.loss(0.9, 4, 2) == math.inf, "a step failed"
    assert not learner.parameters[0].any()


class Timed(Learner):
    """A learner on a clock of its own: a row that is learned takes a second, one that judges a third of it."""

    def __init__(self):
        super().__init__(diverges_at=math.inf)
        self.seconds = 0.0
        same = {"largest": lambda value: value, "broadcast": lambda decide: decide()}
        self.world = SimpleNamespace(**vars(self.world), **same)

    def step(self, rows, rate):
        self.seconds += len(rows)
        return super().step(rows, rate)

    def evaluate(self, rows):
        self.seconds += len(rows) * halving.PASS
        return super().evaluate(rows)


class Rows(list):
    def __init__(self, number):
        super().__init__(range(number))
        self.lengths = np.full(number, 512)


@pytest.fixture
def search(capsys):
    """Return `search(left, **options)`: what is found for a run on 10,000 rows, and what is said of it."""

    def searched(left=math.inf, **options):
        config = FinetuneConfig(learning_rate="auto", batch_size=8, **options)
        learner, job = Timed(), SimpleNamespace(config=config, train=Rows(10_000), validation=Rows(100))
        progress = SimpleNamespace(log=lambda *lines: print(*lines, sep="\n"))
        plan = resolve_steps(config, 10_000, 1)
        found = rate_search.search(job, plan, learner, progress, left, now=lambda: learner.seconds)
        return found, learner.seconds, capsys.readouterr().out

    return searched


@pytest.mark.parametrize("limit", [{"max_minutes": 50}, {"max_cost": 5, "price_per_hour": 6}], ids=str)
def test_the_rate_is_for_as_many_steps_as_the_time_allows(search, limit):
    """And not for those of its epochs. A tenth of 50 minutes is for the search."""
    found, seconds, said = search(3000.0, num_epochs=100, **limit)
    assert 150 < seconds <= 300
    assert "at most 5 min 0 s, and a run takes about 45 min 0 s" in said
    seen = found.best.steps * found.design.batch_size
    assert found.rate == halving.scaled(found.best.rate, seen, found.design.batch_size, 2700.0, 8)
    assert found.rate > search(num_epochs=100, find_lr_minutes=5)[0].rate


def test_a_run_without_epochs_has_the_rate_of_its_time(search):
    """One hour of time and three epochs of half the rows: there is time for more than those."""
    one, other = (search(60.0 * minutes, max_minutes=minutes)[2] for minutes in (600, 6000))
    assert "a run takes about 9 h 0 min" in one and "a run takes about 90 h 0 min" in other


def test_a_run_that_ends_before_its_time_has_the_rate_of_its_steps(search):
    found, _, said = search(60.0 * 600, max_minutes=600, num_epochs=0.5, find_lr_minutes=10)
    assert "at most 10 min 0 s, and a run takes about 1 h 23 min" in said  # 5000 rows
    assert found.rate == search(num_epochs=0.5, find_lr_minutes=10)[0].rate


def test_what_is_used_of_the_time_is_not_for_steps(search):
    assert "a run takes about 15 min 0 s" in search(1200.0, max_minutes=50, num_epochs=100)[2]
    assert "a run takes about 8 s" in search(10.0, max_minutes=50)[2], "one step at least"


def test_a_search_that_ends_early_says_so(search):
    found, _, said = search(find_lr_minutes=0.95)
    assert 9 <= len(found.trials) < 14 and found.best.steps == 2
    assert f"{found.best.rate:.1e} is best after {found.best.steps} steps, the largest that was tried, and" in said
    assert f"there was time for {len(found.trials)} of 14 trials" in said
    with pytest.raises(ConfigError, match=r"0\.5: a search of the learning rate may take 30 s then, "):
        search(find_lr_minutes=0.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["find_lr", "--learning_rate", "1e-3"], "--learning_rate is for finetune"),
        (["find_lr", "--resume"], "--resume is for finetune"),
        (["finetune", "--learning_rate", "most"], "--learning_rate most: input should be a valid number"),
        (["finetune", "--learning_rate", "0"], "--learning_rate 0: input should be greater than 0"),
        (["finetune", "--find_lr_minutes", "0"], "--find_lr_minutes 0"),
    ],
)
def test_what_is_refused(words, said):
    line = refused(*words)
    assert said in line
    assert line.count("--learning_rate") < 2 or "find_lr" in line
