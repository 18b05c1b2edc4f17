"""Thousands of broken inputs, the same every time: each is read, or refused in one line that names the file.

STRESS=1 in the environment makes ten times as many.
"""

import json
import os
import random

import pytest

from lora_alpaca.data import Rows
from lora_alpaca.data.readers import text
from lora_alpaca.errors import DataError, TemplateError
from lora_alpaca.prompts import load_template

TIMES = 10 if os.environ.get("STRESS") == "1" else 1
PARTS = 20  # of the JSON inputs, so that a failure is found again quickly
ROWS = [
    {"instruction": "Greet.", "input": "", "output": "Hello."},
    {"instruction": "Grüße 🦙\u2028", "input": None, "output": "a\tb\n\"c\"\\"},
    {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
    {"prompt": "Once", "completion": " upon a time.", "id": 7, "score": 1.5e-3, "tags": [True, None]},
    {"text": "Once upon a time."},
]  # fmt: skip
FRAGMENTS = [
    *'{}[],:"\\\n\r\t\0\x1f',
    *('":', '",', "},{", "[[", "]]", '{"a":', "//", "/*", "'", "\ufeff", "\u2028", "\x85", "\xa0", "é", "🦙"),
    *("null", "true", "nul", "NaN", "-Infinity", "1e999", "-", "1.", "0x1", "9" * 5000, "[" * 2000, '{"a":' * 1500),
    *("\\ud800", "\\udfff\\ud83e", "\\ud83e\\udd99", "\\u00", "\\u0000", "\\x41", "\\"),
    *('"output":', '"output":3,', '"input\\n":', '"outp\\nut":"",', '"instruction":{},', '"text":"",', '"from":'),
    *('"messages":[', '"role":"system"', '"value":null', '"system":"s",', '"system":[],', '"human"', '"assistant"'),
]
MARKS = [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\xef\xbb", b" " * 40]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return bytes with one to eight things done to them."""
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        place, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        end = min(end, place + chance.choice((1, 2, 5, 60, 1000)))
        match chance.randrange(8):
            case 0 if place < len(data):  # another bit
                data = data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
            case 1:  # gone
                data = data[:place] + data[end:]
            case 2 | 3:  # something of JSON
                data = data[:place] + chance.choice(FRAGMENTS).encode() + data[place:]
            case 4:  # something of JSON instead of something else
                data = data[:place] + chance.choice(FRAGMENTS).encode() + data[end:]
            case 5:  # cut off
                data = data[:end] if chance.random() < 0.3 else data
            case 6:  # twice
                data = data[:end] + data[place:end] * chance.choice((1, 1, 3)) + data[end:]
            case _:  # a mark at the beginning
                data = chance.choice(MARKS) + data if chance.random() < 0.1 else data
    return data


def json_file(chance: random.Random) -> bytes:
    """Return some rows of one kind, or of several, as an array or as lines."""
    kind = chance.choice([ROWS[:2], ROWS[:2], *([row] for row in ROWS[2:]), ROWS])
    rows = [chance.choice(kind) for _ in range(chance.randrange(1, 6))]
    ascii_only = chance.random() < 0.5
    if chance.random() < 0.5:
        return json.dumps(rows, ensure_ascii=ascii_only, indent=chance.choice((None, None, 1))).encode()
    return "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()


def outcome(path, **options):
    """Return what is read, or the error as a text; anything but a DataError fails the test."""
    try:
        rows = Rows(str(path), **options)
        return list(rows), rows.dropped
    except DataError as error:
        said = str(error)
        assert len(said.splitlines()) == 1, repr(said)
        assert path.name in said
        return said.partition(", near ")[0]


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_json_is_read_or_refused(tmp_path, monkeypatch, part):
    """In chunks of any size the same rows are read, and the same is said."""
    chance = random.Random(part)
    path = tmp_path / f"rows.json{'l' * (part % 2)}"
    refused = 0
    for _ in range(2000 * TIMES // PARTS):
        path.write_bytes(mutated(json_file(chance), chance))
        options = {"skip_bad_rows": chance.random() < 0.3}
        monkeypatch.setattr(text, "CHUNK", 1 << 20)
        whole = outcome(path, **options)
        monkeypatch.setattr(text, "CHUNK", chance.choice((1, 3, 17, 100)))
        pieces = outcome(path, **options)
        if "not UTF-8" in whole:  # found early when all is decoded at once; in chunks another flaw may come before
            assert isinstance(pieces, str)
        else:
            assert pieces == whole, path.read_bytes()
        refused += isinstance(whole, str)
    assert 0.2 < refused / (2000 * TIMES // PARTS) < 0.95  # some of each kind


def test_mutated_tables_are_read_or_refused(tmp_path):
    chance, path = random.Random(0), tmp_path / "rows.csv"
    refused = 0
    for _ in range(200 * TIMES):
        rows = [chance.choice(["a,b,c", '"a ""quoted"", one",b,"c\r\nc"', "é,🦙,\u2028"]) for _ in range(4)]
        end = chance.choice(["\n", "\r\n"])
        path.write_bytes(mutated(end.join(["instruction,input,output", *rows]).encode(), chance))
        refused += isinstance(outcome(path, skip_bad_rows=chance.random() < 0.3), str)
    assert 0.1 < refused / (200 * TIMES) < 0.9


def test_mutated_templates_are_loaded_or_refused(tmp_path):
    chance, path = random.Random(0), tmp_path / "mine.json"
    refused = 0
    for _ in range(200 * TIMES):
        whole = load_template(chance.choice(["alpaca", "alpaca_short", "vicuna", "chatml", "plain"])).to_json()
        path.write_bytes(mutated(json.dumps(whole, indent=chance.choice((None, 4))).encode(), chance))
        try:
            load_template(str(path))
        except TemplateError as error:
            assert len(str(error).splitlines()) == 1, repr(str(error))
            assert "mine.json" in str(error)
            refused += 1
    assert 0.2 < refused / (200 * TIMES) < 0.95
