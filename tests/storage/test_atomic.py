"""Locks, flushed files and the errors of a disk.

Numbers in comments are entries of the catalogue of what users' machines do, as `make stress` counts them.
"""

import fcntl
import os
from contextlib import ExitStack

import pytest
from folders import another_process_holds, contents, save

from lora_alpaca.storage import atomic


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def lock(out):
    return out / ".run.lock"


def test_the_lock_of_a_killed_process_is_no_obstacle(lock):  # 91
    with another_process_holds(lock):
        pass
    assert lock.exists()
    with atomic.locked(lock):
        assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()


def test_a_lock_in_use_names_the_process(lock):
    with another_process_holds(lock) as process:
        with pytest.raises(BlockingIOError, match=f"process {process} on "), atomic.locked(lock):
            pytest.fail("two processes hold it")
        assert lock.exists()


def test_no_lock_is_left(out, lock):
    with atomic.locked(lock):
        assert lock.exists()
    assert contents(out) == {}


def test_a_lock_is_left_by_no_error_either(out, lock):
    with pytest.raises(KeyError), atomic.locked(lock):
        raise KeyError
    assert contents(out) == {}


@pytest.mark.parametrize("taken_again", [False, True])
def test_a_lock_file_that_is_removed_while_it_is_waited_for_locks_nobody_else_out(lock, taken_again, monkeypatch):
    """Who has opened the file that the holder then removes must not take it for the lock."""
    flock, holders = fcntl.flock, [ExitStack(), ExitStack()]
    holders[0].enter_context(atomic.locked(lock))

    def slow(descriptor, operation):
        if operation & fcntl.LOCK_EX:
            monkeypatch.setattr(fcntl, "flock", flock)  # the others of this test are quick
            holders[0].close()
            if taken_again:
                holders[1].enter_context(atomic.locked(lock))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with holders[1]:
        if taken_again:
            with pytest.raises(BlockingIOError), atomic.locked(lock):
                pytest.fail("two processes hold it")
            assert lock.exists()
        else:
            with atomic.locked(lock), pytest.raises(BlockingIOError), atomic.locked(lock):
                pytest.fail("two processes hold it")
    assert not lock.exists()


def test_a_lock_that_was_taken_at_once_is_not_removed_by_the_one_before(lock, monkeypatch):
    flock, next_holder = fcntl.flock, ExitStack()

    def quick(descriptor, operation):
        flock(descriptor, operation)
        if operation & fcntl.LOCK_UN:
            monkeypatch.setattr(fcntl, "flock", flock)
            next_holder.enter_context(atomic.locked(lock))

    with next_holder:
        with atomic.locked(lock):
            monkeypatch.setattr(fcntl, "flock", quick)
        with pytest.raises(BlockingIOError), atomic.locked(lock):
            pytest.fail("two processes hold it")
    assert not lock.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_says(out, umask, mode):
    before = os.umask(umask)
    try:
        checkpoint = save(out, 1)
        atomic.replace(out / "record.json", b"{}")
        with atomic.staging_folder(out / "final") as stage:  # safetensors' own writer lets nobody else read
            (stage / "model.safetensors").touch(mode=0o600)
            atomic.fsync_tree(stage)
            atomic.rename(stage / "model.safetensors", out / "model.safetensors")
    finally:
        os.umask(before)
    files = [*checkpoint.iterdir(), out / "record.json", out / "model.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_an_error_in_a_library_is_the_disks_where_it_says_so():
    with pytest.raises(OSError, match="No space left on device"), atomic.rust_errors_as_oserror():
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(ValueError, match="another"), atomic.rust_errors_as_oserror():
        raise ValueError("another")


def test_a_folder_is_set_aside_under_the_first_free_name(out):
    for number in (1, 2):
        out.mkdir(exist_ok=True)
        assert atomic.rename_aside(out) == out.with_name(f"out.{number}")
        out.mkdir()
        assert atomic.rename_aside(out, "left") == out.with_name("out.left" + (".1" if number == 2 else ""))
