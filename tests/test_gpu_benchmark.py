"""The benchmark for cards, on a CPU: every stage ends in a line, whatever becomes of it."""

import json
import os
import subprocess
import sys
import zipfile
from argparse import Namespace

import pytest
from conftest import ROOT

BENCHMARK = ROOT / "benchmarks" / "gpu.py"
NAMES = [
    "device", "gradients", "step_1b", "step_7b", "resume", "generation", "merge", "two_processes", "profile",
]  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """Return the benchmark as a module."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    import gpu

    return gpu


def run(*words):
    """Return exit code and lines of the benchmark on a CPU, and its table."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, BENCHMARK, *map(str, words)], capture_output=True, text=True, env=environment
    )
    lines, _, table = done.stdout.partition("\n\n")
    return done.returncode, [json.loads(line) for line in lines.splitlines()], table


@pytest.mark.slow
def test_every_stage_ends_well_on_a_cpu(tmp_path):
    code, lines, table = run("--device", "cpu", "--tiny", "--max_minutes", 20, "--out", tmp_path / "found.jsonl")
    assert [(line["stage"], line["name"], line["status"]) for line in lines] == [
        (number, name, "ok") for number, name in enumerate(NAMES, 1)
    ], lines
    assert code == 0
    figures = {line["name"]: line["figures"] for line in lines}
    assert figures["device"]["versions"]["torch"]
    assert all(kind["off"] < 0.05 for kind in figures["gradients"]["kinds"].values())
    assert {"ours, 8-bit", "alpaca-lora recipe, 8-bit", "Trainer, 16 bits"} <= set(figures["step_1b"]["ways"])
    assert figures["resume"]["same_bytes"]
    assert figures["two_processes"]["ranks"]["1"]["norm"] == pytest.approx(
        figures["two_processes"]["ranks"]["2"]["norm"], rel=1e-4
    )
    written = (tmp_path / "found.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == lines
    assert json.loads((tmp_path / "found.json").read_text())["stages"] == lines
    assert len(table.strip().splitlines()) == 2 + len(NAMES)


@pytest.mark.slow
def test_a_stage_that_fails_is_a_line_and_the_next_goes_on(tmp_path):
    """A wheel goes before what is installed; and what does not import is named."""
    with zipfile.ZipFile(tmp_path / "fire-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("fire/__init__.py", "raise OSError('libfire.so.13: cannot open shared object file')")
    code, lines, _ = run("--device", "cpu", "--tiny", "--stages", "1,9", "--wheels", tmp_path)
    assert code == 1
    assert [line["status"] for line in lines] == ["failed", "ok"], lines
    assert "these do not import: fire (OSError: libfire.so.13" in lines[0]["error"]
    assert lines[0]["figures"]["versions"]["torch"]  # what was found before


def test_a_stage_that_runs_out_of_time_is_a_line(gpu, tmp_path):
    asked = Namespace(device="cpu", tiny=True)
    line = gpu.run(5, asked, 0.5, tmp_path, dict(os.environ))
    assert (line["name"], line["status"], line["figures"]) == ("resume", "out of time", {})


def test_a_stage_for_which_no_time_is_left_is_left_out(tmp_path):
    code, lines, table = run("--device", "cpu", "--tiny", "--stages", "3,4", "--max_minutes", "0.01")
    assert (code, [line["status"] for line in lines]) == (0, ["left out"] * 2)
    assert "| 4 step_7b | left out | 0 |  |" in table


def test_a_stage_that_there_is_not():
    done = subprocess.run([sys.executable, BENCHMARK, "--stages", "1,10"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there are stages 1 to 9, and not 10" in done.stderr


def test_the_table_shows_what_was_found(gpu):
    figures = {
        "ways": {"ours": {"seconds": 0.12345, "notes": ["long"], "recomputes": False}},
        "versions": {"torch": "2"},
    }
    line = {"stage": 3, "name": "step_1b", "status": "ok", "seconds": 9.5, "figures": figures}
    assert gpu.table([line, line | {"status": "failed", "error": "a | b", "figures": {}}]).splitlines()[2:] == [
        "| 3 step_1b | ok | 9.5 | ways (ours (seconds 0.123, recomputes False)) |",
        "| 3 step_1b | failed | 9.5 | a / b |",
    ]
