"""JSON that anybody may have written: within limits it is read, beyond them it is refused in one line."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from lora_alpaca.errors import AdapterError
from lora_alpaca.storage import json_files
from lora_alpaca.storage.json_files import ABSENT, Count, Shape, load, read_json, require_object


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}),
        ('"[[[[[\\"{{{{["', '[[[[["{{{{['),
        ("[" * 100 + "]" * 100, ...),
        ('["", ",,,,,"]', ["", ",,,,,"]),
        ('"\\ud83e\\udd99"', "\U0001f999"),
        ("\ufeff{}", {}),
    ],
)
def test_json_is_read(tmp_path, text, value):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    assert load(path) == (json.loads(text) if value is ... else value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested too deeply"),
        (b"[" + b"1," * 4_000_001 + b"1]", "more than 4,000,000 values"),
        (b" " * (64 * 2**20 + 1), "larger than 64 MB"),
        (b"\xff\xfe{}", "decode"),
        (b'{"a": 1', "delimiter"),
        (b"", "Expecting value"),
        (b"1" * 5000, "digits"),
        (b'{"name": "\\ud800"}', "surrogates"),
        (b'{"name": "\\uDC00"}', "surrogates"),
    ],
)
def test_what_is_beyond_the_limits_is_refused(tmp_path, data, said):
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        load(path)
    assert read_json(path) == {}
    with pytest.raises(AdapterError, match=r"file\.json: cannot be read \(.*\); copy it again"):
        require_object(path, AdapterError, "copy it again")


def test_the_limits_of_a_file_are_those_of_values_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MOST_VALUES", 10)
    path = tmp_path / "file.json"
    path.write_text(json.dumps([0] * 10))
    assert load(path) == [0] * 10
    path.write_text(json.dumps([0] * 12))
    with pytest.raises(ValueError, match="more than 10 values"):
        load(path)


@pytest.mark.parametrize("what", ["a pipe", "a folder", "a device", "a link to itself", "nothing"])
def test_what_is_no_plain_file_is_not_read(tmp_path, what):
    path = tmp_path / "file.json"
    if what == "a pipe":
        os.mkfifo(path)  # where an ordinary open would wait for ever
    elif what == "a folder":
        path.mkdir()
    elif what == "a device":
        path.symlink_to("/dev/zero")
    elif what == "a link to itself":
        path.symlink_to(path)
    with pytest.raises(OSError, match=r"\w"):
        load(path)
    with pytest.raises(AdapterError, match=r"cannot be read \("):
        require_object(path, AdapterError, "copy it again")


class Form(Shape):
    steps: Count
    name: str | None
    files: list[str] = ABSENT


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"steps": 1, "name": None}, ""),
        ({"steps": 1, "name": "a", "files": ["a"], "more": [1]}, ""),
        ({"name": "a"}, "steps is missing"),
        ({"steps": "1", "name": "a"}, "steps is '1' (input should be a valid integer)"),
        ({"steps": True, "name": "a"}, "steps is True (input should be a valid integer)"),
        ({"steps": 10**20, "name": "a"}, "steps is 100000000000000000000 (input should be"),
        ({"steps": 1, "name": "a", "files": ["a", 5]}, "files.1 is 5 (input should be a valid string)"),
        ({"steps": 1, "name": "a", "files": None}, "files is None"),
        ([], "it is []"),
    ],
)
def test_a_key_that_is_missing_or_of_another_type_is_named(content, said):
    assert Form.what_is_wrong(content).startswith(said)
    assert bool(Form.what_is_wrong(content)) == bool(said)
    if said:
        with pytest.raises(AdapterError, match=r"^file: damaged, [^\n]*; copy it$"):
            Form.require(content, "file", AdapterError, "copy it")


def test_a_long_text_takes_a_few_times_its_size(tmp_path):
    (tmp_path / "long.json").write_text('{"a": "' + "\\n" * (20 << 20) + '"}')
    program = (
        "import resource\nfrom pathlib import Path\nfrom lora_alpaca.storage.json_files import read_json\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\nprint(len(read_json(Path('long.json'))['a']))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.stdout.strip() == str(20 << 20), done.stderr[-300:]
