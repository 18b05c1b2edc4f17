"""A run has its threads: those that it began with, also where it is resumed on a machine that has others."""

import json
import subprocess
import sys

import pytest
import torch
from command import refused, run
from conftest import ROOT
from short_run import flags, interrupt, same

from lora_alpaca.training.threads import used


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
    with used(asked, before) as notes:
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
    "told, expected", [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "7"}, "None")]
)
def test_threads_sleep_where_they_wait_unless_the_user_says_otherwise(told, expected):
    program = (
        "import os, lora_alpaca; print(os.environ.get('OMP_WAIT_POLICY'), *set(__import__('sys').modules) & {'torch'})"
    )
    done = subprocess.run([sys.executable, "-c", program], env=told | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.stdout.decode().strip() == expected, done.stderr
