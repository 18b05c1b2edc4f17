"""Checkpoint folders and what may be done to them, without a model: whose a file is decides.

Numbers in comments are entries of the catalogue of what users' machines do, as `make stress` counts them.
"""

import json
import os
import shutil

import pytest
import torch
from folders import contents, damage, save

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.errors import CheckpointError, ConfigError, TrainingError
from lora_alpaca.storage.output_folder import MANIFEST, remove_checkpoint


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


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
    path = out / "checkpoint-1" / MANIFEST
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
    (theirs / MANIFEST).write_text(json.dumps({"files": ["weights.bin"]}))
    before = contents(out)
    remove_checkpoint(theirs)
    checkpoints.rotate(out, "", keep=0)
    assert contents(out) == before


@pytest.mark.parametrize("how", ["cut", "changed", "missing", "manifest missing", "manifest cut", "manifest empty"])
def test_resume_passes_over_a_damaged_one_and_sets_it_aside(out, how):
    for step in (1, 2):
        save(out, step)
    broken, manifest = out / "checkpoint-2", out / "checkpoint-2" / MANIFEST
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
    assert checkpoints.load(out / "checkpoint-3").weights["a"][0, 0] == 1.0
    assert checkpoints.load(out / "checkpoint-3.left").weights["a"][0, 0] == 2.0


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

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        save(out, 2)
    assert contents(out) == before


def test_what_version_0_1_left_is_swept_and_nothing_else_that_is_hidden(out):
    mine = (".git", ".checkpoint-best.partial", ".final.partial.txt", ".cache")
    for name in (*mine, ".checkpoint-3.partial", ".checkpoint-4.removed", ".final.partial"):
        (out / name).mkdir()
        (out / name / "state.json").write_text("x")
    (out / ".checkpoint-5.partial").mkdir()
    (out / ".checkpoint-5.partial" / "notes.doc").write_text("nothing that it wrote")
    checkpoints.remove_leftovers(out)
    assert {path.name for path in out.iterdir()} == {*mine, ".checkpoint-5.partial"}


@pytest.mark.parametrize("when", ["write", "replace", "unlink"])
def test_what_a_killed_save_or_removal_leaves_is_swept(out, when):
    for step in (1, 2):
        save(out, step)
    process = os.fork()
    if not process:
        setattr(os, when, lambda *_, **__: os._exit(9))
        save(out, 3) if when != "unlink" else checkpoints.rotate(out, "ours", keep=1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert [path for path in out.iterdir() if path.name.startswith(".")]
    (out / ".checkpoint-9.partial-0123456789ab").mkdir()
    (out / ".checkpoint-9.partial-0123456789ab" / "notes").write_text("named like ours, and not marked")
    checkpoints.remove_leftovers(out)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".checkpoint-9.partial-0123456789ab"]
    assert checkpoints.newest(out)[0] == out / "checkpoint-2"


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


@pytest.mark.parametrize(("spare", "left"), [(None, {3, 4}), (1, {1, 3, 4}), (4, {3, 4}), (7, {3, 4})])
def test_a_spared_step_is_not_removed_and_takes_no_place_of_another(out, spare, left):
    for step in (1, 2, 3, 4):
        save(out, step)
    checkpoints.rotate(out, "ours", keep=2, spare=spare)
    assert {path.name for path in out.iterdir()} == {f"checkpoint-{step}" for step in left}


def test_the_weights_of_a_checkpoint_are_verified(out):
    folder = save(out, 3, value=2.0)
    assert torch.equal(checkpoints.weights_of(folder)["a"], torch.full((2, 3), 2.0))
    damage(folder)
    with pytest.raises(CheckpointError, match=r"checkpoint-3: optimizer.safetensors is missing or damaged"):
        checkpoints.weights_of(folder)


def test_a_best_adapter_is_read_as_it_was_written(out):
    best = {"a": torch.full((2, 3), 7.0)}
    facts = {"step": 1, "plan": {}, "progress": {}, "record": {}}
    contents = checkpoints.Checkpoint(facts, {"a": torch.zeros(2, 3)}, {}, best)
    assert torch.equal(checkpoints.load(checkpoints.save(out, "ours", contents, {})).best["a"], best["a"])
    assert checkpoints.load(save(out, 2)).best == {}
