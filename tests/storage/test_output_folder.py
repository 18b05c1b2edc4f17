"""Output folders: whose one is, who works in it, and what is removed from it; without a model.

Numbers in comments are entries of the catalogue of what users' machines do, as `make stress` counts them.
"""

import json
import os
import shutil
import socket
from types import SimpleNamespace

import pytest
from command import refused, run
from folders import another_process_holds, contents, save

from lora_alpaca.errors import FolderError
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import INNER_LOCK, LEFTOVERS, RECORD, OutputFolder

WEIGHTS = "adapter_model.safetensors"
UNFINISHED, FINISHED = {"status": "running"}, {"status": "finished", "files": [WEIGHTS]}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "runs" / "out"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def lock(out):
    """Return the path of the lock of `out`."""
    return out.with_name(".out.lock")


@pytest.fixture
def flags(tiny_llama, data_path, out):
    return (f"--base_model={tiny_llama}", f"--data_path={data_path}", f"--output_dir={out}", "--max_steps=1",
            "--batch_size=4", "--dtype=fp32", "--load_8bit=False", "--cutoff_len=128")  # fmt: skip


def left_by(out, record=None, *, leftovers=True):
    """Let `out` hold what a process leaves that was killed at its very beginning, and a record."""
    for name in LEFTOVERS if leftovers else ():
        (out / name).write_text("process 7 on elsewhere\n")
    if record:
        (out / RECORD).write_text(json.dumps(record))
        (out / WEIGHTS).write_text("weights")


# ------------------------------------------------------------------------------------------------------------ status


@pytest.mark.parametrize(
    ("record", "status"), [(None, "free"), (UNFINISHED, "unfinished"), (FINISHED, "finished"), ({"a": 1}, "foreign")]
)
def test_the_status_is_that_of_the_record(out, record, status):
    left_by(out, record)
    assert OutputFolder(out).status == status


def test_a_folder_that_is_not_there_is_free_and_a_file_is_foreign(out):
    assert OutputFolder(out / "new").status == "free"
    (out / "file").write_text("mine")
    assert OutputFolder(out / "file").status == "foreign"


# ------------------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("way", [(), ("--resume",), ("--overwrite",)])
def test_two_runs_cannot_be_in_one_folder(out, lock, flags, way):  # 91
    with another_process_holds(lock) as process:
        line = refused("finetune", *flags, *way)
        assert f"another run is at work there (process {process} on {socket.gethostname()})" in line
        assert contents(out.parent).keys() == {"out", ".out.lock"}


def test_a_run_and_an_export_cannot_be_in_one_folder(out):
    folder = OutputFolder(out)
    with (
        folder.take(overwrite=False),
        pytest.raises(FolderError, match="another run is at work there"),
        folder.staging(),
    ):
        pytest.fail("two are in it")
    with folder.staging(), pytest.raises(FolderError, match="another run is at work there"), folder.take(False):
        pytest.fail("two are in it")
    assert contents(out.parent) == {"out": ""}


def test_the_lock_is_that_of_the_folder_behind_a_link(out, lock, tmp_path):
    (tmp_path / "link").symlink_to(out)
    with OutputFolder(tmp_path / "link").locked():
        assert lock.exists()
        with pytest.raises(FolderError, match="another run is at work there"):
            OutputFolder(out).check_unlocked()


def test_asking_whether_a_folder_is_locked_leaves_nothing(out, lock):
    OutputFolder(out / "new" / "run").check_unlocked()
    assert contents(out) == {}
    with another_process_holds(lock):
        pass
    OutputFolder(out).check_unlocked()
    assert not lock.exists()


@pytest.mark.parametrize("why", ["a volume", "the folder above is not writable"])
def test_a_lock_that_cannot_be_beside_the_folder_is_inside(out, lock, why, monkeypatch):
    access = os.access
    if why == "a volume":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: path != out.parent and access(path, mode))
    left_by(out)
    with OutputFolder(out).take(overwrite=False):
        assert contents(out).keys() == {INNER_LOCK}
        assert not lock.exists()
        with pytest.raises(FolderError, match=f"another run is at work there .process {os.getpid()} "):
            OutputFolder(out).check_unlocked()
    assert contents(out) == {}


# ------------------------------------------------------------------------------------------------------- making room


@pytest.mark.parametrize(
    ("record", "overwrite", "note", "left"),
    [
        (None, False, None, {}),
        (UNFINISHED, False, None, {f"out/{WEIGHTS}", f"out/{RECORD}"}),
        (UNFINISHED, True, "removed the earlier results in ", {f"out/{WEIGHTS}", f"out/{RECORD}"}),  # not listed
        (FINISHED, False, "out holds finished results; they are now in ", {f"out.1/{WEIGHTS}", f"out.1/{RECORD}"}),
        (FINISHED, True, "removed the earlier results in ", {f"out/{RECORD}"}),
    ],
)
def test_taking_a_folder_makes_room_and_removes_what_a_killed_process_left(out, lock, record, overwrite, note, left):
    left_by(out, record)
    with OutputFolder(out).take(overwrite) as notes:
        assert lock.exists()
        assert out.is_dir()
        assert len(notes) == bool(note)
        assert not note or note in notes[0]
        files = {name for name, data in contents(out.parent).items() if data}
        assert files == {*left, ".out.lock"}
    assert not lock.exists()


@pytest.mark.parametrize(
    ("record", "overwrite", "theirs"),
    [(None, False, False), (None, True, False)]
    + [(FINISHED, overwrite, theirs) for overwrite in (False, True) for theirs in (False, True)],
)
def test_what_is_published_replaces_ours_and_nothing_else(out, record, overwrite, theirs):
    left_by(out, record)
    if theirs:
        (out / "notes.txt").write_text("mine")
    folder = OutputFolder(out)
    with folder.staging() as stage:
        (stage / WEIGHTS).write_text("new weights")
        (stage / RECORD).write_text(json.dumps(FINISHED | {"new": True}))
        notes = folder.publish(stage, overwrite)
    assert len(notes) == bool(record)
    assert folder.record == FINISHED | {"new": True}
    assert (out / WEIGHTS).read_text() == "new weights"
    assert {path.name for path in out.iterdir()} - {"notes.txt"} == {WEIGHTS, RECORD}
    assert (out / "notes.txt").exists() == (theirs and overwrite)
    assert {path.name for path in out.parent.iterdir()} == {"out", *(["out.1"] if record and not overwrite else [])}


def test_what_is_published_is_never_seen_empty(out, monkeypatch):
    """A kill between making the folder and the rename would leave an empty one."""
    moved = []
    rename = atomic.rename
    monkeypatch.setattr(atomic, "rename", lambda one, other: moved.append(os.path.lexists(other)) or rename(one, other))
    folder = OutputFolder(out)
    with folder.staging() as stage:
        (stage / RECORD).write_text(json.dumps(FINISHED))
        folder.publish(stage, overwrite=False)
    assert moved == [False]
    assert folder.record == FINISHED


@pytest.mark.parametrize("version", ["0.1", "this"])
def test_what_a_killed_export_left_beside_the_folder_is_removed(out, version):
    """And nothing that only looks like it."""
    if version == "this":
        process = os.fork()
        if not process:
            with OutputFolder(out).staging() as stage:
                (stage / "model.safetensors").write_text("half")
                os._exit(0)
        os.waitpid(process, 0)
        (stage,) = out.parent.glob(".out.partial-*")
    else:
        stage = out.with_name(".out.partial")
        stage.mkdir()
        (stage / "model.safetensors").write_text("half")
        (stage / INNER_LOCK).write_text("as earlier versions left it")
    theirs = out.with_name(".out.partial-0123456789ab"), out.with_name(".other.partial")
    for folder in theirs:
        folder.mkdir()
        (folder / "notes.doc").write_text("mine")
    with OutputFolder(out).staging() as stage:
        assert contents(stage) == {}
    assert {path.name for path in out.parent.iterdir()} == {"out", *(folder.name for folder in theirs)}


def test_an_error_of_the_disk_names_the_folder(out):
    with pytest.raises(FolderError, match=r"out: it could not be written \(No space left"), OutputFolder(out).staging():
        raise OSError(28, "No space left on device")


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_data_is_read(out, flags, monkeypatch):  # 88
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("too late"))
    assert f"--output_dir {out}: {out} is not writable; name another folder" in refused("finetune", *flags)
    assert contents(out) == {}


def test_a_file_in_place_of_the_folder_is_refused(out, flags):  # 89
    out.rmdir()
    out.write_text("mine")
    assert "is not a folder; name another folder" in refused("finetune", *flags)
    assert out.read_text() == "mine"


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_anything_is_written(out, flags, monkeypatch):  # 86
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = run("finetune", *flags, "--save_steps=1")
    assert result.code == 2
    assert "the disk has 0 MB left; free some, lower --save_total_limit, or name another folder" in result.err
    assert contents(out) == {}


def test_a_folder_of_somebody_else_is_refused_and_untouched(out, flags):  # 90
    (out / "checkpoint-1000").mkdir()
    (out / "checkpoint-1000" / "pytorch_model.bin").write_bytes(b"theirs")
    before = contents(out)
    for way in ((), ("--overwrite",), ("--resume",)):
        result = run("finetune", *flags, *way)
        assert result.code == 2
        assert "is not empty and was not made by lora_alpaca; name another folder" in result.err
        assert "starting fresh" not in result.out
    assert contents(out) == before


def test_overwriting_removes_what_is_ours_and_nothing_else(out):  # 90
    save(out, 3)
    (out / "checkpoint-3" / "notes.txt").write_text("mine")
    theirs = out / "checkpoint-best-KEEP"
    theirs.mkdir()
    (theirs / "weights").write_text("mine")
    for name in (WEIGHTS, "tokenizer.json", "plan.txt"):
        (out / name).write_text(name)
    record = {"status": "finished", "files": [WEIGHTS, "tokenizer.json", "../outside.txt"]}
    (out / RECORD).write_text(json.dumps(record))
    (out.parent / "outside.txt").write_text("mine")
    OutputFolder(out).remove_ours()
    left = {name for name, data in contents(out).items() if data}
    assert left == {"checkpoint-3/notes.txt", "checkpoint-best-KEEP/weights", "plan.txt", RECORD}
    assert (out.parent / "outside.txt").exists()
    assert OutputFolder(out).status == "unfinished"  # and ours: the command can be given again
