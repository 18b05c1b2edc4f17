"""What a run says while it works: rows of a step and of a validation, once a minute, and a bar that moves by rows."""

import io
import re
import sys
import threading
from contextlib import nullcontext
from itertools import pairwise

import pytest
from test_step import OPTIONS, packed, padded, with_adapter
from transformers import AutoTokenizer

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.models.lora import LoraAdapter
from lora_alpaca.prompts import load_template
from lora_alpaca.training.progress import Limits, Progress
from lora_alpaca.training.step import Stepper

ROWS = 24


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize("budget", [None, 96], ids=["padded", "packed"])
@pytest.mark.parametrize("what", ["step", "validation"])
def test_a_log_file_hears_of_a_long_pass_once_a_minute(tiny_llama, rows, clock, capsys, what, budget):
    """Every batch takes 50 seconds: within a step and within a validation, no minute passes without a line."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    examples = Encoder.for_prompts(tokenizer, load_template("alpaca_short")).encode(rows[:ROWS])
    progress, told, said, done = Progress(quiet=False, now=clock), [], [0.0], []

    def advance(*passed):
        for _ in range(10):
            clock.seconds += 5
            progress.tick()  # as the thread does
            if lines := capsys.readouterr().out.splitlines():
                said.append(clock.seconds)
                told.extend(lines)
        progress.advance(*passed)
        done.append(passed)

    progress.start(total_steps=2, step=0, batch_size=ROWS)
    config = FinetuneConfig(**OPTIONS)
    with World(config) as world:
        model = with_adapter(tiny_llama, world.spec)
        with packed(model, budget) if budget else nullcontext((padded(model, 4), [])) as (engine, _):
            stepper = Stepper(engine, LoraAdapter(model), Replicated(world), world, config, print, advance)
            with progress.next_step() if what == "step" else progress.stage("validation", ROWS):
                stepper.step(examples, 0.0) if what == "step" else stepper.evaluate(examples)
    assert len(done) >= 4
    assert done[-1] == (ROWS, ROWS, sum(len(example.ids) for example in examples))
    assert all(later - earlier <= 60 for earlier, later in pairwise([*said, clock.seconds]))
    name = "step 1/2" if what == "step" else "validation"
    found = [
        re.fullmatch(rf"{name}: (\d+) of {ROWS} rows, \d+ tokens/s, (?:\d+ min )?\d+ s left", line) for line in told
    ]
    assert all(found), told
    counts = [int(match[1]) for match in found]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] < ROWS


def test_a_batch_that_takes_minutes_is_told_too(clock, capsys):
    progress = Progress(quiet=False, now=clock)
    progress.start(total_steps=3, step=0, batch_size=8)
    with progress.next_step():
        clock.seconds = 54
        progress.tick()
        assert capsys.readouterr().out == ""
        clock.seconds = 56
        progress.tick()
        progress.tick()
    assert capsys.readouterr().out == "step 1/3: 0 of 8 rows in 56 s\n"


def test_other_work_is_told_with_its_time(clock, capsys):
    progress = Progress(quiet=False, now=clock)
    with progress.stage("loading llama"):
        clock.seconds = 61
        progress.tick()
    clock.seconds = 200
    progress.tick()  # nothing is under way
    assert capsys.readouterr().out == "loading llama: 1 min 1 s so far\n"


def test_other_ranks_say_nothing(clock, capsys):
    with Progress(quiet=True, now=clock, every=0.0) as progress, progress.stage("loading llama"):
        progress.tick()
    assert capsys.readouterr().out == ""


def test_time_left_and_money_spent(clock, capsys):
    """The time that is left is that of the steps, but no more than the run may take."""
    progress = Progress(quiet=False, now=clock)
    progress.start(4, 0, 8, Limits(left=lambda: 500.0 - clock.seconds, spent=lambda: clock.seconds / 100))
    with progress.next_step():
        clock.seconds = 100
    progress.step(1, 4, 1.5, 20.0)
    progress.interval(1.5, 1e-4, 20.0)
    with progress.next_step():
        clock.seconds = 160
        progress.advance(4, 8, 600)
        progress.tick()
    progress.step(2, 40, 1.5, 20.0)  # the plan has more steps now
    progress.interval(1.5, 1e-4, 20.0)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/4  loss 1.5000  rate 1.00e-04  20 tokens/s  5 min 0 s left, 1.00 spent",
        "step 2/4: 4 of 8 rows, 10 tokens/s, 4 min 27 s left, 1.60 spent",
        "step 2/40  loss 1.5000  rate 1.00e-04  20 tokens/s  5 min 40 s left, 1.60 spent",
    ]


def test_a_thread_says_it_unasked(monkeypatch):
    class Out(io.StringIO):
        def write(self, text):
            if "loading" in text:
                heard.set()
            return super().write(text)

    heard = threading.Event()
    monkeypatch.setattr(sys, "stdout", Out())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(quiet=False, every=0.02) as progress, progress.stage("loading llama"):
        assert heard.wait(30)
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_the_bar_moves_by_rows(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown():
        return re.findall(r"(\d+)/(\d+) \[", terminal.getvalue())[-1]

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(quiet=False, now=clock) as progress:
        assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
        progress.start(total_steps=4, step=1, batch_size=8)
        with progress.next_step():
            progress.advance(6, 8, 300)
        with progress.stage("validation", 20):
            progress.advance(18, 20, 300)  # of other rows
        progress.stop()
    assert shown() == ("14", "32")
