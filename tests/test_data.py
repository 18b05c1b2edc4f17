import json

import pytest

from lora_alpaca.data import load_conversations, split
from lora_alpaca.errors import DataError

ROW = {"instruction": "Greet.", "input": "", "output": "Hello."}


def written(tmp_path, content, name="rows.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (json.dumps([ROW, ROW]), "rows.json"),
        (json.dumps([ROW, ROW]), "rows.jsonl"),
        (f"{json.dumps(ROW)}\r\n\n{json.dumps(ROW)}", "rows.jsonl"),
        (f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n", "ROWS.JSON"),
        ("\ufeff" + json.dumps([ROW, ROW]), "a file, with spaces é.json"),
    ],
)
def test_arrays_and_lines_are_told_apart_by_content(tmp_path, content, name):
    rows = load_conversations(written(tmp_path, content, name))
    assert [(row.instruction, row.input, row.output) for row in rows] == [("Greet.", "", "Hello.")] * 2


def test_texts_arrive_exactly(tmp_path):
    texts = ["2023-01-01", "</s> <|im_end|>", "{input} %s", "\u2028 \u200b 🦙 שלום", " lead\ttrail \n", "null", "NaN"]
    content = "\n".join(json.dumps(ROW | {"output": text}, ensure_ascii=False) for text in texts)
    assert [row.output for row in load_conversations(written(tmp_path, content))] == texts


def test_input_may_be_missing_or_null(tmp_path):
    rows = load_conversations(
        written(tmp_path, '[{"instruction": "a", "output": "b"}, {"instruction": "a", "input": null, "output": "b"}]')
    )
    assert [row.input for row in rows] == ["", ""]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("  \n ", "the file is empty"),
        ("[]", "contains 0 rows"),
        ("hello", "rows.json:1: not JSON at line 1"),
        ('[{"instruction": "a",}]', "not JSON at line 1, column 22"),
        ('[{"instruction": "a", "output": "b"}, {"instr', "truncated?"),
        (json.dumps(ROW) + '\n{"instruction": "a"', "rows.json:2: not JSON"),
        (b"\xff\xfe[\x00]\x00", "UTF-16"),
        (b'[{"instruction": "a",\n "output": "\xe9"}]', "not UTF-8 at line 2, byte 34"),
        ('[{"instruction": "a", "instruction": "b", "output": "c"}]', "'instruction' is given twice"),
        ('[{"instruction": "a", "output": NaN}]', "NaN is not JSON"),
        ('[{"instruction": "a", "output": "\\ud800"}]', "rows.json:1: output holds half of a surrogate pair"),
        ('[{"instruction": "a", "output": null}]', "rows.json:1: output is null"),
        ('[{"instruction": "a", "output": 3}]', "rows.json:1: output is 3"),
        ('[{"instruction": "a", "output": ["b"]}]', "rows.json:1: output is"),
        (json.dumps([ROW] * 3000 + [ROW | {"output": 1}]), "rows.json:3001: output is 1"),
        ('[{"instrution": "a", "output": "b"}]', "did you mean 'instrution'?"),
        ('[{"instruction": "a"}]', "rows.json:1: no output"),
        ('["text"]', "rows.json:1: a row is an object"),
        ('{"data": [1]}', "rows.json:1: no instruction; the row has 'data'"),
        ('[{"instruction": "a", "output": ""}]', "the output of every row is empty"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path, content, said):
    with pytest.raises(DataError) as error:
        load_conversations(written(tmp_path, content))
    assert said in str(error.value)
    assert "rows.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.json", "table.csv", "a/b/c", "/absolute/path"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        load_conversations(name)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "rows.json").mkdir()
    with pytest.raises(DataError, match="not a regular file"):
        load_conversations(str(tmp_path / "rows.json"))


def test_a_hub_id_offline_says_what_to_pass():
    with pytest.raises(DataError, match=r"--data_path nobody/nothing: not a local file.*pass a \.json file"):
        load_conversations("nobody/nothing")


def test_split_depends_on_the_seed_alone():
    rows = list(range(100))
    train, validation = split(rows, 20, seed=1)
    assert split(rows, 20, seed=1) == (train, validation)
    assert split(rows, 20, seed=2)[1] != validation
    assert sorted(train + validation) == rows
    assert len(validation) == 20


@pytest.mark.parametrize(
    ("rows", "val_set_size", "held_out"),
    [(100, None, 10), (30_000, None, 2000), (9, None, 0), (100, 0.25, 25), (100, 0, 0)],
)
def test_split_sizes(rows, val_set_size, held_out):
    assert len(split(list(range(rows)), val_set_size, 42)[1]) == held_out


def test_split_larger_than_the_data():
    with pytest.raises(DataError, match="--val_set_size 2000: there are only 50 rows"):
        split(list(range(50)), 2000, 42)
