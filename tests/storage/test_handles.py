"""Folders held open, folders of this user alone, and what Windows does otherwise, by a stand-in for it."""

import os
import stat

import pytest
from folders import contents, save

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.errors import FolderError
from lora_alpaca.storage import atomic, handles
from lora_alpaca.storage.handles import RealFolder, make_private
from lora_alpaca.storage.output_folder import OutputFolder

# ------------------------------------------------------------------------------------------------------ private folders


def test_a_private_folder_is_made_and_used_again(tmp_path):
    folder = tmp_path / "above" / "cache"
    assert make_private(folder) == ""
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert make_private(folder) == ""
    (tmp_path / "link").symlink_to(folder)
    assert make_private(tmp_path / "link") == ""


@pytest.mark.parametrize(
    ("mode", "above", "wrong"),
    [
        (0o755, 0o755, ""),  # as version 0.1 made it: others can read, not write
        (0o775, 0o755, "can be written to by other users"),
        (0o757, 0o755, "can be written to by other users"),
        (0o700, 0o777, "lies in a folder in which anybody can exchange it"),
        (0o700, 0o1777, ""),
    ],
)
def test_a_folder_that_others_can_write_to_is_not_private(tmp_path, mode, above, wrong):
    folder = tmp_path / "above" / "cache"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    folder.parent.chmod(above)
    assert make_private(folder) == wrong


@pytest.mark.parametrize("linked", [False, True])
def test_the_folder_of_another_user_is_not_private(tmp_path, monkeypatch, linked):
    folder = tmp_path / "cache"
    folder.mkdir()
    if linked:
        (tmp_path / "link").symlink_to(folder)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert make_private(tmp_path / "link" if linked else folder) == "belongs to another user"


def test_a_file_is_no_private_folder(tmp_path):
    (tmp_path / "cache").write_text("mine")
    assert make_private(tmp_path / "cache") == "is not a folder"


# -------------------------------------------------------------------------------------------------------- held open


def test_what_takes_the_place_of_a_folder_that_is_held_is_not_touched(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "file").write_text("precious")
    with RealFolder.opened(ours) as held:
        ours.rename(tmp_path / "moved")
        ours.symlink_to(theirs)
        held.remove_listed(["sub/file"])
        (tmp_path / "new").write_text("new")
        held.take(tmp_path / "new")
    assert contents(theirs).keys() == {"sub", "sub/file"}
    assert contents(tmp_path / "moved").keys() == {"new"}


def test_a_hidden_folder_that_was_exchanged_is_left_alone(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("precious")
    with pytest.raises(OSError, match="was exchanged"), atomic.hidden_folder(tmp_path / "out") as hidden:
        hidden.rename(tmp_path / "moved")
        theirs.rename(hidden)
    assert (hidden / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["", ".", "..", "../file", "/etc/passwd", "sub/../../file"])
def test_no_name_leads_out_of_a_folder(tmp_path, name):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "out" / "sub").mkdir(parents=True)
    with RealFolder.opened(tmp_path / "out") as held:
        held.remove_listed([name])
    assert contents(tmp_path).keys() == {"file", "out", "out/sub"}


# ----------------------------------------------------------------------------------------------------------- Windows


@pytest.fixture
def windows(monkeypatch):
    """Let the disk behave as that of Windows: no handles of folders, no rename over one or over what is open."""
    replace, opened, busy = os.replace, os.open, []

    def rename(path, to, **handle):
        assert not any(handle.values()), "Windows has no handles of folders"
        if os.path.isdir(to):
            raise PermissionError(13, "Access is denied", str(to))
        if busy:
            raise PermissionError(32, "The process cannot access the file", busy.pop())
        replace(path, to)

    def only_files(path, flags, mode=0o777, *, dir_fd=None):
        assert dir_fd is None, "Windows has no handles of folders"
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags & ~getattr(os, "O_NOFOLLOW", 0), mode)

    def without_handles(function):
        def call(path, *more, dir_fd=None, **options):
            assert dir_fd is None, "Windows has no handles of folders"
            return function(path, *more, **options)

        return call

    monkeypatch.setattr(handles, "WINDOWS", True)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(os, "open", only_files)
    for name in ("stat", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, without_handles(getattr(os, name)))
    monkeypatch.delattr(os, "fchmod")
    monkeypatch.setattr(handles, "PATIENCE", (0.001, 0.001))
    return busy


def test_a_run_and_an_export_use_folders_as_windows_lets_them(windows, tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out).take(overwrite=False):
        OutputFolder(out).write_record({"status": "running"})
        for step in (1, 2):
            save(out, step)
            checkpoints.rotate(out, "ours", keep=1)
        assert checkpoints.newest(out) == (out / "checkpoint-2", {})
        OutputFolder(out).write_record({"status": "finished", "files": []})
    for overwrite in (False, True):
        folder = OutputFolder(out)
        with folder.staging() as stage:
            (stage / "model").mkdir()
            (stage / "model" / "weights").write_text("new")
            record = {"status": "finished", "files": ["model/weights"]}
            atomic.write(stage / "lora_alpaca.json", atomic.as_json(record))
            atomic.fsync_tree(stage)
            folder.publish(stage, overwrite)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.1"}
    assert (out / "model" / "weights").read_text() == "new"


def test_a_file_that_a_scanner_holds_open_is_renamed_a_little_later(windows, tmp_path):
    (tmp_path / "file").write_text("old")
    windows.append("file")
    atomic.replace(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "new"
    windows.extend(["file"] * 9)
    with pytest.raises(PermissionError):
        atomic.replace(tmp_path / "file", b"newer")
    assert contents(tmp_path).keys() == {"file"}


def test_a_folder_is_not_entered_through_a_link_on_windows_either(windows, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "theirs")
    with RealFolder.opened(tmp_path / "out") as held:
        held.remove_listed(["sub/file"])
        with pytest.raises(NotADirectoryError), held.inside("sub"):
            pytest.fail("it is a link")
        held.remove("sub")
    assert (tmp_path / "theirs" / "file").read_text() == "precious"


@pytest.mark.parametrize("name", ["CON", "nul.txt", "a/com1", "ends.", "ends ", "what?", "a:b", "pipe|"])
def test_a_name_that_windows_reserves_is_refused(windows, tmp_path, name):
    with pytest.raises(FolderError, match="is no name for a folder on Windows; name another one"):
        OutputFolder(tmp_path / name).check(overwrite=False, remedy="")


def test_elsewhere_every_name_is_taken(tmp_path):
    OutputFolder(tmp_path / "CON" / "what?.").check(overwrite=False, remedy="")
