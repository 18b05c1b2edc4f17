"""A small share of the programme of faults: every part runs, counts what it tried, and finds nothing."""

import importlib
import os

import pytest
from faults import running
from faults.scene import Scene

PARTS = {  # the share of its cases, and the names of what it must have counted
    "crash_points": (0.025, {"crash_points run", "crash_points export", "crash_points resume"}),
    "power_loss": (0.08, {"power_cuts images", "power_cuts resumed"}),
    "disk": (0.03, {"disk_full", "disk_errors", "disk_final_saves", "disk_operations"}),
    "nonfinite": (0.12, {"nonfinite", "nonfinite skipped", "nonfinite overflows"}),
    "changed_settings": (0.1, {"changed_settings refused", "changed_settings applied", "files_moved"}),
    "memory_faults": (0.08, {"memory", "memory shrunk", "memory resumed"}),
    "sharded": (0.01, {"sharded exact cases", "kills", "sharded rank faults", "sharded disk errors"}),
}
QUICK = {"memory_faults"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the faults are put into forked processes")
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.slow) if part not in QUICK else part for part in PARTS]
)
def test_nothing_fails(part, tmp_path):
    share, counted = PARTS[part]
    report = importlib.import_module(f"faults.{part}").programme(share, tmp_path)
    assert report.failures == []
    assert counted <= {name for name, number in report.counts.items() if number}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the faults are put into forked processes")
@pytest.mark.parametrize("begin", ["forked", pytest.param("typed", marks=pytest.mark.slow)])
def test_a_run_notes_its_phases(begin, tmp_path):
    """Moments to kill and to signal are drawn from them; a phase that is not noted is never struck."""
    scene = Scene(tmp_path)
    ended = getattr(running, begin)(scene, scene.fresh()).ended()
    assert ended.code == 0, ended.last()
    assert [(entry.phase, entry.step) for entry in ended.phases] == [
        ("load", 0), ("validate", 0),
        ("train", 0), ("stepped", 1), ("save", 1),
        ("train", 1), ("stepped", 2), ("validate", 2), ("save", 2), ("rotate", 2),
        ("train", 2), ("stepped", 3), ("validate", 3), ("final save", 3), ("end", 3),
    ]  # fmt: skip
    times = [entry.time for entry in ended.phases]
    assert times == sorted(times)
