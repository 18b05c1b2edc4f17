"""Locks, checkpoint folders and what may be done to them, without a model: whose a file is decides.

Numbers in comments are entries of the catalogue of what users' machines do, as `make stress` counts them.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from command import refused, run

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.artifacts.checkpoint import Checkpoint
from lora_alpaca.errors import CheckpointError, ConfigError, FolderError, TrainingError
from lora_alpaca.storage import atomic, output_folder

SETTINGS = {"peft_type": "LORA", "r": 8}


def save(folder, step, run="ours", value=1.0):
    """Write a checkpoint of a run, the way that training does."""
    facts = {"step": step, "plan": {}, "progress": {}, "record": {}}
    tensors = {"a": torch.full((2, 3), value)}
    return checkpoints.save(folder, run, Checkpoint(facts, tensors, {"0.exp_avg": torch.zeros(2, 3)}), SETTINGS)


def damage(checkpoint):
    with open(checkpoint / checkpoints.OPTIMIZER, "r+b") as file:
        file.write(b"\1")


def contents(folder):
    """Return every file below a folder with its hash, and every empty folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def flags(tiny_llama, data_path, out):
    return (f"--base_model={tiny_llama}", f"--data_path={data_path}", f"--output_dir={out}", "--max_steps=1",
            "--batch_size=4", "--dtype=fp32", "--load_8bit=False", "--cutoff_len=128")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- locks


@contextmanager
def another_process_in(folder):
    """Let another process hold the lock of a folder; it can be killed by its number."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        with atomic.locked(folder):
            os.write(writer, b"in")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 2)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("way", [(), ("--resume",), ("--overwrite",)])
def test_two_runs_cannot_be_in_one_folder(out, flags, way):  # 91
    with another_process_in(out) as process:
        line = refused("finetune", *flags, *way)
        assert f"another run is at work there (process {process} on {socket.gethostname()})" in line
        assert contents(out).keys() == {atomic.LOCK}


def test_the_lock_of_a_killed_process_is_no_obstacle(out):  # 91
    with another_process_in(out):
        pass
    assert (out / atomic.LOCK).exists()
    with atomic.locked(out):
        assert str(os.getpid()) in (out / atomic.LOCK).read_text()


def test_no_lock_is_left(out):
    with atomic.locked(out):
        assert (out / atomic.LOCK).exists()
    assert contents(out) == {}


def test_a_lock_is_left_by_no_error_either(out):
    with pytest.raises(KeyError), atomic.locked(out):
        raise KeyError
    assert contents(out) == {}


def test_a_stage_in_use_is_refused_and_stays(out):
    with another_process_in(out / ".checkpoint-3.partial"):
        with pytest.raises(BlockingIOError, match="process"):
            save(out, 3)
        assert (out / ".checkpoint-3.partial" / atomic.LOCK).exists()
    assert save(out, 3).is_dir()


# -------------------------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_says(out, umask, mode):
    before = os.umask(umask)
    try:
        checkpoint = save(out, 1)
        atomic.replace(out / output_folder.RECORD, b"{}")
        with atomic.staging_folder(out / "final") as stage:  # safetensors' own writer lets nobody else read
            (stage / "model.safetensors").touch(mode=0o600)
            atomic.fsync_tree(stage)
            atomic.rename(stage / "model.safetensors", out / "model.safetensors")
    finally:
        os.umask(before)
    files = [*checkpoint.iterdir(), out / output_folder.RECORD, out / "model.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_data_is_read(out, flags, monkeypatch):  # 88
    monkeypatch.setattr(output_folder.os, "access", lambda path, mode: False)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("too late"))
    assert f"--output_dir {out}: {out} is not writable; name another folder" in refused("finetune", *flags)
    assert contents(out) == {}


def test_a_file_in_place_of_the_folder_is_refused(out, flags):  # 89
    out.rmdir()
    out.write_text("mine")
    assert "is not a folder; name another folder" in refused("finetune", *flags)
    assert out.read_text() == "mine"


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_anything_is_written(out, flags, monkeypatch):  # 86
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
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
    for name in ("adapter_model.safetensors", "tokenizer.json", "plan.txt"):
        (out / name).write_text(name)
    record = {"status": "finished", "files": ["adapter_model.safetensors", "tokenizer.json", "../outside.txt"]}
    (out / output_folder.RECORD).write_text(json.dumps(record))
    (out.parent / "outside.txt").write_text("mine")
    output_folder.remove_ours(out)
    left = {name for name, data in contents(out).items() if data}
    assert left == {"checkpoint-3/notes.txt", "checkpoint-best-KEEP/weights", "plan.txt", output_folder.RECORD}
    assert (out.parent / "outside.txt").exists()
    assert output_folder.folder_status(out) == "unfinished"  # and ours: the command can be given again


def test_an_error_in_a_library_is_the_disks_where_it_says_so(out):
    with pytest.raises(OSError, match="No space left on device"), atomic.rust_errors_as_oserror():
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(ValueError, match="another"), atomic.rust_errors_as_oserror():
        raise ValueError("another")
    with (
        pytest.raises(FolderError, match=r"out: it could not be written \(No space left"),
        output_folder.disk_errors_named(out),
    ):
        raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_rotation_removes_the_oldest_of_this_run_only(out):  # 90
    for step in (1, 2, 3, 10):
        save(out, step)
    save(out, 4, run="another")
    foreign = out / "checkpoint-5"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    checkpoints.rotate(out, "ours", keep=2)
    assert {path.name for path in out.iterdir()} == {"checkpoint-3", "checkpoint-10", "checkpoint-4", "checkpoint-5"}


def test_the_step_counts_and_no_clock(out):  # 95
    for step in (2, 9, 10):
        checkpoint = save(out, step)
        for path in (checkpoint, *checkpoint.iterdir()):
            os.utime(path, (1e9 - step, 1e9 - step))
    assert checkpoints.newest(out)[0] == out / "checkpoint-10"
    checkpoints.rotate(out, "ours", keep=1)
    assert [path.name for path in out.iterdir()] == ["checkpoint-10"]


def test_a_users_file_in_a_checkpoint_survives_its_removal(out):
    for step in (1, 2):
        save(out, step)
    (out / "checkpoint-1" / "samples").mkdir()
    (out / "checkpoint-1" / "samples" / "notes.txt").write_text("mine")
    checkpoints.rotate(out, "ours", keep=1)
    left = [path.name for path in (out / "checkpoint-1").rglob("*") if path.is_file()]
    assert left == ["notes.txt"]
    assert checkpoints.newest(out)[0] == out / "checkpoint-2"


def test_a_removal_that_is_interrupted_leaves_nothing_that_looks_like_a_checkpoint(out, monkeypatch):
    for step in (1, 2):
        save(out, step)
    removed, unlink = [], os.unlink

    def once(path, **where):
        if removed:
            raise OSError(5, "Input/output error")
        removed.append(path)
        unlink(path, **where)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(os, "unlink", once)
        checkpoints.rotate(out, "ours", keep=1)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert checkpoints.newest(out) == (out / "checkpoint-2", {})
    checkpoints.rotate(out, "ours", keep=1)
    assert [path.name for path in out.iterdir()] == ["checkpoint-2"]


def test_a_manifest_removes_nothing_outside_its_folder(out):
    outside = out.parent / "precious.txt"
    outside.write_text("mine")
    for step in (1, 2):
        save(out, step)
    path = out / "checkpoint-1" / output_folder.MANIFEST
    manifest = json.loads(path.read_text())
    for name in ("../../precious.txt", str(outside), "../checkpoint-2/state.json"):
        manifest["files"][name] = {"bytes": 4, "sha256": ""}
    path.write_text(json.dumps(manifest))
    checkpoints.rotate(out, "ours", keep=1)
    assert outside.read_text() == "mine"
    assert not checkpoints.verify(out / "checkpoint-2")


def test_a_manifest_of_somebody_else_removes_nothing(out):
    theirs = out / "checkpoint-7"
    theirs.mkdir()
    (theirs / "weights.bin").write_bytes(b"theirs")
    (theirs / output_folder.MANIFEST).write_text(json.dumps({"files": ["weights.bin"]}))
    before = contents(out)
    output_folder.remove_checkpoint(theirs)
    checkpoints.rotate(out, "", keep=0)
    assert contents(out) == before


@pytest.mark.parametrize("how", ["cut", "changed", "missing", "manifest missing", "manifest cut", "manifest empty"])
def test_resume_passes_over_a_damaged_one_and_sets_it_aside(out, how):
    for step in (1, 2):
        save(out, step)
    broken, manifest = out / "checkpoint-2", out / "checkpoint-2" / output_folder.MANIFEST
    {
        "cut": lambda: os.truncate(broken / "state.json", 5),
        "changed": lambda: damage(broken),
        "missing": lambda: (broken / "adapter_config.json").unlink(),
        "manifest missing": manifest.unlink,
        "manifest cut": lambda: os.truncate(manifest, 50),
        "manifest empty": lambda: manifest.write_text("{}"),
    }[how]()
    newest, passed = checkpoints.newest(out)
    assert newest == out / "checkpoint-1"
    assert passed == {broken: passed[broken]}
    assert "is missing or damaged" in passed[broken]
    said = checkpoints.set_aside_after(out, newest)
    assert said == [f"{broken} is now checkpoint-2.damaged"]
    assert {path.name for path in out.iterdir()} == {"checkpoint-1", "checkpoint-2.damaged"}


def test_where_none_is_whole_that_is_an_error_that_names_them(out):
    for step in (1, 2):
        damage(save(out, step))
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2: optimizer.* checkpoint-1: .*; start anew with --overwrite"
    ):
        checkpoints.newest(out)


def test_going_on_from_an_older_one_sets_the_newer_aside(out):
    for step in (1, 2, 3):
        save(out, step)
    said = checkpoints.set_aside_after(out, checkpoints.resolve(str(out / "checkpoint-1")))
    assert len(said) == 2
    assert {path.name for path in out.iterdir()} == {"checkpoint-1", "checkpoint-2.left", "checkpoint-3.left"}
    save(out, 2)
    checkpoints.set_aside_after(out, out / "checkpoint-1")  # once more: the name is taken
    assert (out / "checkpoint-2.left.1").is_dir()


def test_going_on_from_elsewhere_sets_all_aside(out, tmp_path):
    save(out, 1)
    elsewhere = save(tmp_path / "elsewhere", 5)
    checkpoints.set_aside_after(out, elsewhere)
    assert [path.name for path in out.iterdir()] == ["checkpoint-1.left"]


def test_a_checkpoint_in_the_way_of_a_new_one_is_set_aside(out):
    save(out, 3, run="another", value=2.0)
    save(out, 3)
    assert checkpoints.newest(out)[0] == out / "checkpoint-3"
    assert checkpoints.load(out / "checkpoint-3").adapter["a"][0, 0] == 1.0
    assert checkpoints.load(out / "checkpoint-3.left").adapter["a"][0, 0] == 2.0


def test_a_copy_is_taken_only_when_it_is_whole(out, tmp_path):  # 96: where a rename is copying, file by file
    there, copied = save(tmp_path / "there", 2), out / "checkpoint-2"
    save(out, 1)
    copied.mkdir()
    files = sorted(path.name for path in there.iterdir())
    for count, name in enumerate([*files, ""]):
        assert (checkpoints.newest(out)[0] == copied) == (count == len(files))
        if name:
            (copied / name).write_bytes((there / name).read_bytes()[:-1])
            assert checkpoints.newest(out)[0] != copied
            shutil.copy(there / name, copied / name)


def test_a_checkpoint_with_a_number_that_is_none_is_never_written(out):
    with pytest.raises(TrainingError, match="step 7: a is no longer finite, so no checkpoint is made of it"):
        save(out, 7, value=float("nan"))
    assert contents(out) == {}


def test_a_failed_write_leaves_nothing_and_the_older_checkpoint(out, monkeypatch):  # 87
    save(out, 1)
    before = contents(out)

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        save(out, 2)
    assert contents(out) == before


def test_remains_are_swept_and_nothing_else_that_is_hidden(out):
    mine = (".git", ".checkpoint-best.partial", ".final.partial.txt", ".cache")
    for name in (*mine, ".checkpoint-3.partial", ".checkpoint-4.removed", ".final.partial"):
        (out / name).mkdir()
        (out / name / "file").write_text("x")
    checkpoints.remove_leftovers(out)
    assert {path.name for path in out.iterdir()} == set(mine)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "no such folder"),
        ("empty", "holds no checkpoint"),
        ("adapter", "with a fresh optimizer: --init_adapter"),
    ],
)
def test_what_is_named_must_be_a_checkpoint(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=said):
        checkpoints.resolve(str(tmp_path / name))
