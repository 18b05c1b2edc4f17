"""A command without a home, cache, temporary folder, locale or the right to write: it works, or says why not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import error_line, run

from lora_alpaca.storage.output_folder import read_record
from lora_alpaca.storage.paths import user_cache

NOT_ASCII = [{"instruction": f"Sag {number}: 你好", "input": "é", "output": f"Ünï {number} 🦙"} for number in range(8)]
SHORT = ["--max_steps", 1, "--batch_size", 2, "--val_set_size", 2, "--load_8bit", "False", "--dtype", "fp32"]


@pytest.fixture
def homeless(monkeypatch):
    """Let this user have no home, as in a container that was given any number of a user."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.fixture
def train(tiny_llama, data_path, tmp_path, monkeypatch):
    """Return a function that trains for a step in an empty folder, with prepared rows kept."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("lora_alpaca.data.cache.CACHED_FROM", 10)
    return lambda: run("finetune", "--base_model", tiny_llama, "--data_path", data_path, *SHORT)


def test_without_a_home_nothing_is_cached_and_no_folder_is_made_for_it(homeless, train):
    assert train().code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["lora-alpaca"]
    assert not user_cache().exists()


@pytest.mark.parametrize("place", ["/dev/null/cache", "relative", "file"])
def test_a_cache_that_cannot_be_kept_costs_nothing_but_time(train, place, monkeypatch):
    Path("file").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(place).resolve()) if place == "file" else place)
    assert train().code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["file", "lora-alpaca"]
    assert Path("file").read_text() == "mine"


def test_a_last_save_that_fails_where_nothing_temporary_can_be_written_either(train, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def none(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("lora_alpaca.artifacts.adapter_folder.save", full)
    monkeypatch.setattr("tempfile.mkdtemp", none)
    monkeypatch.setattr("tempfile.gettempdir", none)
    assert error_line(train(), 1).endswith(
        "the adapter could not be saved there (No space left on device), nor where temporary files are; free space, "
        "and --resume goes on from the last checkpoint"
    )


# ------------------------------------------------------------------------------------------------- whole commands

UNKNOWN_USER = ["unshare", "--user", "--map-user=12345"]  # owns what the tests own, and may not more than an owner may


def can_be_another_user():
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*UNKNOWN_USER, "true"], capture_output=True).returncode == 0


@pytest.fixture
def place(tmp_path):
    """Return a folder with rows that are not ASCII, and one that cannot be written to."""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in NOT_ASCII), encoding="utf-8"
    )
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed").chmod(0o555)
    return tmp_path


def ended(words, cwd, user=(), **variables):
    """Return exit code, stdout and stderr of a command with few variables; a value of None unsets one."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    given = kept | {"CUDA_VISIBLE_DEVICES": "", "HOME": str(cwd), "LANG": "C.UTF-8"} | variables
    env = {name: value for name, value in given.items() if value is not None}
    line = [*user, sys.executable, "-m", "lora_alpaca", *map(str, words)]
    done = subprocess.run(line, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert "Traceback" not in out + err and "Exception ignored" not in err, err
    return done.returncode, out, err


def commands(place):
    """Return the words of a run and of an answer, and of rows that are shown, with letters that are not ASCII."""
    rows = place / "rows.jsonl"
    return {
        "finetune": ["finetune", "--data_path", rows, "--output_dir", place / "öut", "--overwrite", *SHORT[:-2]],
        "generate": ["generate", "--lora_weights", place / "öut", "--instruction", "Sag 你好", "--max_new_tokens", 4],
        "show": ["show", "--data_path", rows, "--row", "1,2"],
    }


LOCALES = {
    "C": {"LANG": "C"},
    "none": {"LANG": None},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "no columns": {"COLUMNS": "0", "LINES": "0"},
    "no temporary folder": {"TMPDIR": "/nonexistent"},
    "dumb": {"TERM": "dumb", "NO_COLOR": "1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCALES)
def test_whole_commands_in_any_locale(place, name):
    for words in commands(place).values():
        code, _, err = ended(words, place, **LOCALES[name])
        assert code == 0, err
    record = read_record(place / "öut")
    assert record["options"]["output_dir"] == "öut"


@pytest.mark.slow
@pytest.mark.skipif(not can_be_another_user(), reason="user namespaces are not allowed here")
def test_whole_commands_of_a_user_without_a_name_or_home(place):
    for words in commands(place).values():
        code, _, err = ended(words, place, UNKNOWN_USER, HOME=None)
        assert code == 0, err
    assert sorted(path.name for path in place.iterdir()) == ["fixed", "rows.jsonl", "öut"]
    for home in (place / "fixed", "/nonexistent"):
        code, _, err = ended(commands(place)["generate"], place, UNKNOWN_USER, HOME=str(home))
        assert code == 0, err


@pytest.mark.slow
@pytest.mark.skipif(not can_be_another_user(), reason="user namespaces are not allowed here")
def test_whole_commands_in_a_folder_that_cannot_be_written_to(place):
    fixed = place / "fixed"
    words = commands(place)
    alone = ["finetune", "--data_path", place / "rows.jsonl", *SHORT[:-2]]
    code, _, err = ended(alone, fixed, UNKNOWN_USER)
    assert code == 2
    assert err == f"error: --output_dir lora-alpaca: {fixed} is not writable; name another folder\n"
    for line in words.values():
        code, _, err = ended(line, fixed, UNKNOWN_USER, XDG_CACHE_HOME=str(fixed))
        assert code == 0, err
    code, _, err = ended([*words["show"], "--html", "rows.html"], fixed, UNKNOWN_USER)
    assert code != 0
    assert err.splitlines()[-1].startswith("error: ")
