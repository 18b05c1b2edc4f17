"""A run has its threads: those that it began with, also where it is resumed on a machine that has others."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from command import refused, run
from conftest import ROOT
from short_run import flags, interrupt, same

from lora_alpaca.training import threads


@pytest.fixture(autouse=True)
def one_thread():
    """Begin with one thread, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "asked, before, number, said",
    [
        (None, None, 1, ""),
        (None, 1, 1, ""),
        (None, 2, 2, "computing with 2 threads (as when the run began), not 1"),
        (2, None, 2, "computing with 2 threads (--threads), not 1"),
        (2, 3, 2, "--threads 2: the run began with 3, and goes on with other roundings"),
        (2, 2, 2, "computing with 2 threads (--threads), not 1"),
    ],
)
def test_the_number_and_what_is_said_of_it(asked, before, number, said):
    with threads.used(asked, before) as notes:
        assert torch.get_num_threads() == number
        assert "".join(notes) == said
    assert torch.get_num_threads() == 1


def test_a_resumed_run_computes_with_the_threads_that_it_began_with(tiny_llama, data_path, tmp_path):
    options = {
        "base_model": tiny_llama, "data_path": data_path, "batch_size": 4, "max_steps": 6, "save_steps": 3,
        "eval_steps": 3, "val_set_size": 4, "cutoff_len": 128, "dtype": "fp32", "load_8bit": False, "report": False,
    }  # fmt: skip
    whole = run("finetune", *flags(options | {"output_dir": tmp_path / "whole", "threads": 2}))
    assert whole.code == 0 and "computing with 2 threads (--threads)" in whole.out
    assert json.loads((tmp_path / "whole" / "lora_alpaca.json").read_text())["hardware"]["threads"] == 2
    parts = {"output_dir": tmp_path / "parts"}
    run("finetune", *flags(options | parts | {"threads": 2}))
    interrupt(tmp_path / "parts", last_checkpoint=3)
    resumed = run("finetune", *flags(options | parts | {"resume": True}))
    assert resumed.code == 0 and "computing with 2 threads (as when the run began" in resumed.out
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_no_threads_are_refused():
    assert "--threads 0" in refused("finetune", "--threads", 0)


@pytest.mark.parametrize(
    "told, expected",
    [
        ({}, "passive 3000"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
        ({"KMP_BLOCKTIME": "0"}, "None None"),
    ],
)
def test_threads_soon_sleep_where_they_wait_unless_the_user_says_otherwise(told, expected):
    program = (
        "import os, lora_alpaca; print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')),"
        " *set(__import__('sys').modules) & {'torch'})"
    )
    done = subprocess.run([sys.executable, "-c", program], env=told | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.stdout.decode().strip() == expected, done.stderr


# ---------------------------------------------------------------------------------------- the measurement at the start


class Cores:
    """A clock, and a step that takes a time of its own with every number of threads, and a longer one now and then."""

    def __init__(self, *times):
        self.seconds, self.steps, self.times = 0.0, 0, dict(enumerate(times, 1))

    def step(self):
        self.steps += 1
        held_up = 5 if self.steps % 5 == 0 else 1
        self.seconds += held_up * self.times[torch.get_num_threads()]

    def __call__(self):
        return self.seconds


@pytest.mark.parametrize(
    "one, two, number", [(0.1, 0.06, 2), (0.1, 0.1, 2), (0.1, 0.13, 2), (0.1, 0.15, 1), (0.1, 0.4, 1), (3.0, 9.0, 1)]
)
def test_one_thread_is_taken_where_it_is_clearly_faster(monkeypatch, one, two, number):
    cores = Cores(one, two)
    monkeypatch.setattr(threads, "time", SimpleNamespace(perf_counter=cores))
    torch.set_num_threads(2)
    assert threads.faster(cores.step, 2) == (number, pytest.approx(two / one))
    assert torch.get_num_threads() == 2
    assert cores.seconds < max(5, 10 * (one + two))


OPTIONS = {
    "batch_size": 4, "max_steps": 2, "save_steps": 1, "val_set_size": 4, "cutoff_len": 128, "dtype": "fp32",
    "load_8bit": False, "report": False,
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """Return how often a run has measured; every measurement has a pass over rows, and finds one thread faster."""
    counted = []

    def faster(step, most):
        step()
        counted.append(most)
        return 1, 2.0

    monkeypatch.setattr(threads, "faster", faster)
    for name in threads.TOLD:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    return counted


def trained(base, rows, folder, *words):
    return run("finetune", *flags(OPTIONS | {"base_model": base, "data_path": rows, "output_dir": folder}), *words)


def test_a_run_that_begins_measures_and_has_its_number_from_then_on(tiny_llama, data_path, tmp_path, measured):
    began = trained(tiny_llama, data_path, tmp_path / "out")
    assert began.code == 0, began.err
    assert "computing with 1 thread, measured 2.0 times as fast as 2 (--threads)" in began.out
    assert measured == [2] and torch.get_num_threads() == 2
    hardware = json.loads((tmp_path / "out" / "lora_alpaca.json").read_text())["hardware"]
    assert hardware["threads"] == 1
    interrupt(tmp_path / "out", last_checkpoint=1)
    resumed = trained(tiny_llama, data_path, tmp_path / "out", "--resume", True)
    assert resumed.code == 0 and "computing with 1 thread (as when the run began), not 2" in resumed.out
    assert measured == [2]


def test_what_is_measured_leaves_no_trace(tiny_llama, data_path, tmp_path, measured):
    assert trained(tiny_llama, data_path, tmp_path / "measured").code == 0
    assert trained(tiny_llama, data_path, tmp_path / "told", "--threads", 1).code == 0
    assert measured == [2] and same(tmp_path / "measured", tmp_path / "told")


@pytest.mark.parametrize("name", threads.TOLD)
def test_nothing_is_measured_where_the_user_has_said_it(tiny_llama, data_path, tmp_path, measured, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert trained(tiny_llama, data_path, tmp_path / "out").code == 0
    assert measured == []


def test_long_passes_are_not_measured(tiny_llama, data_path, tmp_path, measured, monkeypatch):
    monkeypatch.setattr(threads, "LONG", 0.0)
    assert trained(tiny_llama, data_path, tmp_path / "out").code == 0
    assert measured == []


def test_the_search_of_a_rate_measures_too(tiny_llama, data_path, measured):
    options = flags(OPTIONS | {"base_model": tiny_llama, "data_path": data_path})
    found = run("find_lr", *options)
    assert found.code == 0, found.err
    assert "computing with 1 thread, measured 2.0 times as fast" in found.out and measured == [2]
    assert "computing with 3 threads (--threads), not 2" in run("find_lr", *options, "--threads", 3).out
    assert measured == [2]
