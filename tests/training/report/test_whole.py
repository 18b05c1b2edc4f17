"""A report is whole at any kill, and that of several ranks is that of one."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, TORCHRUN
from faults.operations import Watch, dies_before
from faults.scene import Scene

from lora_alpaca.data import row_losses
from lora_alpaca.storage.json_files import load
from lora_alpaca.training.report import files

MOMENTS = 20


def is_whole(folder):
    """Return whether the files of a report, as far as they are there, are whole."""
    page, text, facts, rows = (folder / name for name in (files.PAGE, files.TEXT, files.FACTS, files.ROWS))
    if rows.exists():
        row_losses.read(rows)
    if facts.exists():
        assert load(facts)["kind"] == files.KIND
    ends = {page: "</html>\n", text: "```\n"}
    return all(path.read_text().endswith(end) for path, end in ends.items() if path.exists())


@pytest.mark.slow
def test_a_run_that_is_killed_at_twenty_moments_has_a_whole_report_or_none(tmp_path):
    scene = Scene(tmp_path / "scene", {"report_rows": 4, "logging_steps": 10, "max_steps": 2, "save_steps": 2})
    work, counted = tmp_path / "work", tmp_path / "operations"
    work.mkdir()

    def is_of_a_report(path, more):
        return any("report" in str(one) or "row_losses" in str(one) for one in (path.relative_to(work), more or ""))

    def only(act):
        """Return what sees the operations of reports alone."""

        def before(kind, path, more):
            return act(kind, path, more) if is_of_a_report(path, more if isinstance(more, Path) else "") else None

        return before

    def count(kind, path, more):
        with watch.own_open(counted, "a") as file:
            file.write(f"{kind}\n")

    watch = Watch(work, only(count))
    assert scene.finetune(work / "out", watch.begin).code == 0
    assert is_whole(work / "out")
    total = len(counted.read_text().splitlines())
    assert total > MOMENTS
    seen = set()
    for moment in range(MOMENTS):
        number, out = 1 + moment * (total - 1) // (MOMENTS - 1), work / f"out-{moment}"
        died = scene.finetune(out, Watch(work, only(dies_before(number, halfway=True))).begin)
        assert died.code == 9, died.last()
        assert is_whole(out), f"killed before operation {number} of {total}"
        seen.add(tuple((out / name).exists() for name in (files.PAGE, files.TEXT, files.FACTS, files.ROWS)))
    assert len(seen) > 2, "no kill came between the first files"
    begun = work / f"out-{MOMENTS // 4}"  # in its first report; the last one was killed in its last, and is finished
    for folder, again in ((begun, scene.finetune(begun, resume=True)), (out, scene.command("report", run=out))):
        assert again.code == 0, again.last()
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert is_whole(folder)
        assert files.read_facts(folder)["status"] == "finished"


@pytest.mark.slow
def test_two_ranks_sharded_or_not_report_what_one_does(tmp_path):
    scene = Scene(tmp_path / "scene", {"lora_dropout": 0.0, "val_set_size": 6, "batch_size": 4})
    more = {"report_rows": 8, "report_answers": 2, "device": "cpu"}
    found = {}
    for name, begin in (("one", TORCHRUN[:1]), ("none", TORCHRUN), ("full", TORCHRUN)):
        options = scene.options | more | {"output_dir": tmp_path / name}
        options |= {"shard": name} if name != "one" else {}
        words = [str(word) for option in options.items() for word in (f"--{option[0]}", option[1])]
        done = subprocess.run(
            [*begin, str(ROOT / "finetune.py"), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        assert "incomplete" not in done.stdout
        rows, _ = row_losses.read(tmp_path / name / files.ROWS)
        found[name] = rows, files.read_facts(tmp_path / name)["answers"]["before"]
    rows, answers = found["one"]
    assert {row.part for row in rows} == {"training", "validation"}
    for name in ("none", "full"):
        assert [row[:4] for row in found[name][0]] == [row[:4] for row in rows]
        assert [row.before for row in found[name][0]] == pytest.approx([row.before for row in rows], rel=1e-4)
        assert [row.after for row in found[name][0]] == pytest.approx([row.after for row in rows], rel=1e-2)
        assert found[name][1] == answers
