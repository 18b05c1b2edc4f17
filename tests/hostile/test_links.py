"""Links under every name that we make: what they lead to is never read as ours, changed, or removed.

Each kind of link lies in wait under each name while a folder is used as commands use it. The command ends well or with
one error; what lies outside of its folder is the same afterwards, to the time of its last change.
"""

import json
import os
import secrets
import shutil
from contextlib import suppress
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
import torch
from faults.scene import Scene
from folders import save
from short_run import interrupt

from lora_alpaca.artifacts import adapter_folder, tokenizer_files
from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.artifacts.adapter_folder import TrainedAdapter
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.errors import LoraAlpacaError
from lora_alpaca.models.base import Base
from lora_alpaca.prompts import load_template
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import INNER_LOCK, RECORD, OutputFolder

KINDS = ("file", "folder", "dangling", "loop")
TOKEN = "0123456789ab"  # the end of every hidden name, which is drawn at random otherwise
HIDDEN = [f"partial-{TOKEN}", f"removed-{TOKEN}", "partial", "removed"]  # of this version and of 0.1
BESIDE = [".out.lock", *(f".out.{ending}" for ending in HIDDEN), "out.1"]
INSIDE = [
    *(RECORD, INNER_LOCK, *(f".{RECORD}.{ending}" for ending in HIDDEN)),
    *("checkpoint-1", "checkpoint-2", "checkpoint-1.left", "checkpoint-1/manifest.json", "checkpoint-2/state.json"),
    *(f".checkpoint-{step}.{ending}" for step in (1, 2) for ending in HIDDEN),
    *(f".final.{ending}" for ending in HIDDEN),
    *("adapter_model.safetensors", "adapter_config.json", "prompt_contract.json", "tokenizer.json", "templates"),
    "templates/tool.jinja",
]
NAMES = [*BESIDE, *(f"out/{name}" for name in INSIDE)]


class Tokenizer:
    """What is saved of a tokenizer: files, one of them in a folder."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")
        (folder / "templates").mkdir()
        (folder / "templates" / "tool.jinja").write_text("{{ messages }}")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return the folder above `out`, beside a folder of somebody else's."""
    monkeypatch.setattr("secrets.token_hex", lambda length: TOKEN)
    precious = tmp_path / "precious" / "checkpoint-1"
    precious.mkdir(parents=True)
    (tmp_path / "precious" / "file.txt").write_text("precious")
    record = {"status": "finished", "files": ["file.txt"]}
    (tmp_path / "precious" / RECORD).write_text(json.dumps(record))
    for name in (RECORD, "state.json", "model.safetensors"):
        (precious / name).write_text("precious")
    manifest = {"run": "ours", "step": 1, "files": {"state.json": {"bytes": 8, "sha256": ""}}}
    (precious / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def lay(place, name, kind):
    """Put a link of a kind under a name, in place of what is there."""
    link, precious = place / name, place.parent / "precious"
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    leads_to = {"file": precious / "file.txt", "folder": precious, "dangling": precious / "new", "loop": link}[kind]
    if kind == "folder" and "checkpoint-" in name:
        leads_to = precious / "checkpoint-1"
    link.symlink_to(leads_to)


def everything(folder):
    """Return all that can be known of a folder: names, contents, modes, times."""
    return {
        str(path): (os.lstat(path)[:7], os.lstat(path)[8:10], path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
    }


def train(out, overwrite=False, resume=False):
    """Use a folder as a run of three checkpoints does."""
    folder = OutputFolder(out)
    folder.check_unlocked()
    chosen = checkpoints.newest(out)[0] if resume else None
    folder.check(overwrite or resume, remedy="")
    record = {"kind": "adapter", "status": "running", "run": "ours", "base_model": "demo", "base_revision": None}
    with folder.take(overwrite), folder.disk_errors_named():
        checkpoints.remove_leftovers(out)
        checkpoints.set_aside_after(out, chosen)
        folder.write_record(record)
        for step in (1, 2, 3):
            save(out, step)
            checkpoints.rotate(out, "ours", keep=1)
        result = RunResult(out, 3, None, None, None, 1.0, [])
        tensors, no_base = {"lora_B": torch.ones(2)}, cast(Base, None)
        adapter = TrainedAdapter(
            tensors, {"peft_type": "LORA"}, no_base, Tokenizer(), load_template("plain"), {}, record
        )
        with mock.patch.object(tokenizer_files, "write", lambda stage, *_: Tokenizer().save_pretrained(stage)):
            adapter_folder.save(out, adapter, result)


def export(out, overwrite=False):
    """Use a folder as an export does."""
    folder = OutputFolder(out)
    folder.check(overwrite, remedy="")
    with folder.staging() as stage:
        (stage / "model.safetensors").write_text("model")
        Tokenizer().save_pretrained(stage)
        files = ["model.safetensors", "tokenizer.json", "templates/tool.jinja"]
        atomic.write(stage / RECORD, atomic.as_json({"status": "finished", "files": files}))
        atomic.fsync_tree(stage)
        folder.publish(stage, overwrite)


USES = {
    "finetune": lambda out: train(out),
    "resume": lambda out: train(out, resume=True),
    "overwrite": lambda out: train(out, overwrite=True),
    "export": lambda out: export(out),
    "export over": lambda out: export(out, overwrite=True),
}
BEFORE = {"nothing": lambda out: None, "a finished run": train, "an export": export, "an unfinished run": None}


def unfinished(out):
    """Leave a run that was killed after its second checkpoint."""
    out.mkdir()
    for step in (1, 2):
        save(out, step)
    OutputFolder(out).write_record({"status": "running", "run": "ours", "base_model": "demo"})


BEFORE["an unfinished run"] = unfinished


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_link_is_never_followed(place, name, kind, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    pairs = [(before, use) for before in BEFORE for use in USES]
    for before, use in pairs if "STRESS" in os.environ else pairs[(NAMES.index(name) + KINDS.index(kind)) % 4 :: 4]:
        shutil.rmtree(place)
        place.mkdir()
        BEFORE[before](place / "out")
        lay(place, name, kind)
        outside = everything(place.parent / "precious")
        error = None
        try:
            USES[use](place / "out")
        except LoraAlpacaError as found:
            error = str(found)
        what = f"{use} over {before}, {name} is a link to a {kind}: {error or 'no error'}"
        assert everything(place.parent / "precious") == outside, what
        assert error is None or "\n" not in error, what
        if error is None:
            folder = OutputFolder(place / "out")
            assert not (place / "out").is_symlink(), what
            assert folder.status == "finished", what
            ours = [*folder.record["files"], RECORD]
            assert all((place / "out" / file).is_file() for file in ours), what
            assert not any((place / "out" / file).is_symlink() for file in ours), what
            assert not (place / "out" / "templates").is_symlink(), what


COMMANDS = ("finetune", "resume", "overwrite", "export", "export over", "generate")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Return a scene with a finished run, `made/run`, and a run that was killed after its second checkpoint."""
    scene = Scene(tmp_path_factory.mktemp("scene"), {"save_total_limit": 2})
    for name in ("run", "killed"):
        ended = scene.finetune(scene.folder / "made" / name)
        assert ended.code == 0, ended.said
    interrupt(scene.folder / "made" / "killed", 2)
    return scene


def given(scene, command, out):
    """Return how a command ended whose hidden names are not drawn at random."""

    def foretold():
        secrets.token_hex = lambda length: TOKEN

    if command == "generate":
        said = {"instruction": "Hi.", "max_new_tokens": 2, "lora_weights": out}
        return scene.command("generate", foretold, **said)
    if command.startswith("export"):
        over = {"overwrite": True} if command == "export over" else {}
        options = {"lora_weights": scene.folder / "made" / "run", "output_dir": out}
        return scene.command("export", foretold, **options | over)
    way = {} if command == "finetune" else {command: True}
    return scene.finetune(out, foretold, **way)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forked processes")
@pytest.mark.parametrize("kind", KINDS)
def test_a_link_is_never_followed_by_a_command(scene, place, kind):
    pairs = [(name, command) for name in NAMES for command in COMMANDS]
    for name, command in pairs if "STRESS" in os.environ else pairs[5 * KINDS.index(kind) :: 23]:
        shutil.rmtree(place)
        place.mkdir()
        if command != "finetune":
            shutil.copytree(scene.folder / "made" / ("killed" if command == "resume" else "run"), place / "out")
        lay(place, name, kind)
        outside = everything(place.parent / "precious")
        ended = given(scene, command, place / "out")
        what = f"{command}, {name} is a link to a {kind}: {ended.code}, {ended.last()}"
        assert everything(place.parent / "precious") == outside, what
        assert ended.code == 0 or ended.error(), what
        assert ended.code in (0, 1, 2), what
        if ended.code == 0 and command != "generate":
            assert OutputFolder(place / "out").status == "finished", what


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("use", USES)
def test_a_link_that_the_user_names_is_used_as_what_it_leads_to(place, before, use):
    BEFORE[before](place / "real")
    if before == "nothing":
        (place / "real").mkdir()
    (place / "out").symlink_to("real")
    unfinished_refused = before == "an unfinished run" and use in ("finetune", "export")
    with suppress(LoraAlpacaError) if unfinished_refused else pytest.MonkeyPatch.context():
        USES[use](place / "out")
        assert not unfinished_refused
    assert (place / "out").is_symlink()
    assert OutputFolder(place / "out").status == ("unfinished" if unfinished_refused else "finished")
    assert not (place / "real").is_symlink()
    aside = before in ("a finished run", "an export") and use in ("finetune", "resume", "export")
    assert {path.name for path in place.iterdir()} == {"real", "out", *(["real.1"] if aside else [])}


@pytest.mark.parametrize("leads_to", ["nothing", "itself", "below itself"])
@pytest.mark.parametrize("use", USES)
def test_a_link_that_leads_nowhere_is_refused(place, use, leads_to):
    out = place / "out"
    out.symlink_to(place / "new" if leads_to == "nothing" else out)
    out = out / "run" if leads_to == "below itself" else out
    with pytest.raises(LoraAlpacaError, match="is a symbolic link that leads nowhere; name another folder"):
        USES[use](out)
    assert [path.name for path in place.iterdir()] == ["out"]


def test_what_is_not_a_lock_of_ours_stays(place):
    (place / ".out.lock").write_text("mine")
    with pytest.raises(LoraAlpacaError, match=r"\.out\.lock is no lock of lora_alpaca; remove it"):
        train(place / "out")
    os.link(place.parent / "precious" / "file.txt", place / ".hard.lock")
    (place / ".hard.lock").write_text("process 7 on elsewhere")
    with pytest.raises(LoraAlpacaError, match="is no lock of lora_alpaca"):
        train(place / "hard")
    assert (place / ".out.lock").read_text() == "mine"
    assert (place.parent / "precious" / "file.txt").read_text() == "process 7 on elsewhere"


def test_another_disk_below_a_folder_is_not_entered(place, monkeypatch):
    train(place / "out")
    stat = os.stat
    other = stat(place / "out" / "templates").st_ino

    def mounted(path, *, dir_fd=None, follow_symlinks=True):
        found = stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        if found.st_ino != other:
            return found
        return SimpleNamespace(st_mode=found.st_mode, st_dev=found.st_dev + 1, st_ino=other)

    monkeypatch.setattr(os, "stat", mounted)
    OutputFolder(place / "out").remove_ours()
    assert (place / "out" / "templates" / "tool.jinja").is_file()
    assert not (place / "out" / "tokenizer.json").exists()
