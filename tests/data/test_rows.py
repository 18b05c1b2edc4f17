"""Files and hub datasets to conversations: exact texts, true places, a reason for everything that is wrong."""

import datetime
import gzip
import io
import itertools
import json
import os
from pathlib import Path

import pytest
from forms import FORMS, as_csv, as_parquet

from lora_alpaca.config.shared import DEMO
from lora_alpaca.data import Rows, demo_file, held_out
from lora_alpaca.data.readers import files, text
from lora_alpaca.data.readers.json_rows import Bad
from lora_alpaca.errors import DataError

ROW = {"instruction": "Greet.", "input": "", "output": "Hello."}
CHUNKS = (1, 7, 64)


def written(tmp_path, content, name="rows.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def said_of(rows):
    """Return what rows say, in pairs of role and text."""
    return [[(message.role, message.text) for message in row.messages] for row in rows]


def raw(path):
    """Return the numbered values in a file, before anything is made of them."""
    return list(files.read_file(Path(path)))


def refusal(data_path, *arguments, **options):
    """Return the one line that says why rows cannot be read."""
    with pytest.raises(DataError) as error:
        Rows(str(data_path), *arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_every_kind_of_file_says_the_same(tmp_path, name, packed):
    rows = [ROW | {"output": text} for text in ("Hello.", 'a "quote", a comma', "line\nline\r\nline", " é 🦙 \u2028 ")]
    content = FORMS[name](rows)
    path = written(tmp_path, gzip.compress(content) if packed else content, name + (".gz" if packed else ""))
    read = Rows(path)
    assert [row.answers for row in read] == [[row["output"]] for row in rows]
    assert read.formats == {"Alpaca": 4}
    assert len(read) == 4


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (json.dumps([ROW, ROW]), "rows.json"),
        (json.dumps([ROW, ROW]), "rows.jsonl"),
        (f"{json.dumps(ROW)}\r\n\n \t\r\n{json.dumps(ROW)}", "rows.jsonl"),
        (f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n", "ROWS.JSON"),
        ("\ufeff" + json.dumps([ROW, ROW]), "a file, with spaces é.json"),
        (f"\ufeff{json.dumps(ROW)}\n{json.dumps(ROW)}\n", "rows.json"),
        (" \n" * 5000 + json.dumps([ROW, ROW]) + "\n\n", "rows.json"),
        ("\ufeff" + as_csv([ROW, ROW]).decode(), "rows.csv"),
        ("\n" + as_csv([ROW, ROW]).decode().replace("\r\n", "\n\n"), "rows.csv"),
    ],
)
def test_arrays_and_lines_are_told_apart_by_content(tmp_path, content, name):
    rows = Rows(written(tmp_path, content, name))
    assert [(row.question.text, row.question.input, *row.answers) for row in rows] == [("Greet.", "", "Hello.")] * 2


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_texts_arrive_exactly(tmp_path, name):
    texts = ["2023-01-01", "</s> <|im_end|>", "{input} %s", "\u2028 \u200b 🦙 שלום", " lead\ttrail \n", "null", "NaN"]
    rows = [ROW | {"output": text} for text in texts]
    content = as_csv(rows) if name == "rows.csv" else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert [row.answers for row in Rows(written(tmp_path, content, name))] == [[text] for text in texts]


def test_the_where_of_a_row_is_its_line_or_its_place_in_the_list(tmp_path):
    array = Rows(written(tmp_path, json.dumps([ROW, ROW])))
    lines = Rows(written(tmp_path, f"\n{json.dumps(ROW)}\n\n{json.dumps(ROW)}", "rows.jsonl"))
    table = Rows(written(tmp_path, 'instruction,output\na,"b\nc"\n\nd,e\n', "rows.csv"))
    assert [row.where for row in array] == ["rows.json:1", "rows.json:2"]
    assert [row.where for row in lines] == ["rows.jsonl:2", "rows.jsonl:4"]
    assert [row.where for row in table] == ["rows.csv:2", "rows.csv:5"]


def test_several_sources_with_commas_between(tmp_path):
    one = written(tmp_path, json.dumps([ROW]), "one.json")
    two = written(tmp_path, as_csv([ROW | {"output": "Two."}]), "two.csv")
    rows = Rows(f"{one}, {two},{DEMO}")
    assert [row.where for row in itertools.islice(rows, 3)] == ["one.json:1", "two.csv:2", "train.json:1"]
    assert len(rows) == 2 + len(Rows(str(demo_file("train"))))
    assert rows.formats == {"Alpaca": len(rows)}


def test_a_list_may_be_longer_than_a_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, json.dumps([ROW]), "rows.json")
    assert len(Rows(",".join(["rows.json"] * 300))) == 300


def test_sources_of_several_formats(tmp_path):
    one = written(tmp_path, json.dumps([ROW]), "one.json")
    two = written(tmp_path, json.dumps({"text": "Once upon a time."}), "two.jsonl")
    assert Rows(f"{one},{two}").formats == {"Alpaca": 1, "text": 1}


def test_a_path_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, json.dumps([ROW]))
    assert len(Rows("~/rows.json")) == 1
    assert "no such file" in refusal("~nobody-of-that-name/rows.json")


# ------------------------------------------------------------------------------------------- the array, in chunks

VALUES = [
    {"text": 'a é 🦙 \u2028 שלום \\ " \n \ud83e\udd99'.encode("utf-16", "surrogatepass").decode("utf-16")},
    [],
    {},
    "",
    "]",
    12345.6789e-3,
    -1,
    0,
    123456789,
    1e5,
    True,
    False,
    None,
    [[{"a": [1, 2.5, "x,]"]}]],
    " " * 40,
    "🦙" * 20,
]


@pytest.mark.parametrize("form", ["compact", "indented", "escaped", "spaced"])
@pytest.mark.parametrize("chunk", [*range(1, 20), 64])
def test_an_array_in_chunks_is_the_array(tmp_path, monkeypatch, chunk, form):
    """Characters of several bytes, numbers, escapes and words are cut at every place."""
    monkeypatch.setattr(text, "CHUNK", chunk)
    content = {
        "compact": json.dumps(VALUES, ensure_ascii=False, separators=(",", ":")),
        "indented": "\ufeff" + json.dumps(VALUES, ensure_ascii=False, indent=3),
        "escaped": json.dumps(VALUES),
        "spaced": " " * 30 + json.dumps(VALUES).replace(", ", "  \r\n    ,      \n ") + "\n" * 30,
    }[form]
    read = raw(written(tmp_path, content))
    assert [value for _, value in read] == json.loads(content.removeprefix("\ufeff"))
    assert [number for number, _ in read] == list(range(1, len(VALUES) + 1))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("spoilt", ['"b": NaN', '"b": {"a": 1, "a": 2}', '"b": ' + "9" * 5000])
def test_a_spoilt_row_in_a_chunk_leaves_the_others(tmp_path, monkeypatch, chunk, spoilt):
    monkeypatch.setattr(text, "CHUNK", chunk)
    content = '[{"a": 1}, {' + spoilt + ', "c": "' + "x" * 200 + '"}, {"a": 2}]'
    read = [value for _, value in raw(written(tmp_path, content))]
    assert [read[0], read[2]] == [{"a": 1}, {"a": 2}]
    assert isinstance(read[1], Bad)


LONG = "é" * 100
GOOD = '{"a": "' + LONG + '"}'


@pytest.mark.parametrize("chunk", [*CHUNKS, 1 << 20])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f'[{GOOD},\n {GOOD},\n {{"a" 1}}]', 'rows.json:3: not JSON at line 3, column 7: Expecting \':\' delimiter'),
        (f"[{GOOD},\n {GOOD}, x]", "rows.json:3: not JSON at line 2, column 113: Expecting value"),
        (f"[{GOOD} {GOOD}]", "rows.json:1: not JSON at line 1, column 112: a comma or ] is missing"),
        (f"[\n{GOOD}\n,\n]", "rows.json:1: not JSON at line 4, column 1: a row is missing after the comma"),
        (f'[{GOOD},\n\n{{"a": "\t"}}]', "rows.json:2: not JSON at line 3, column 8: Invalid control character"),
        (f'[{GOOD},\n{{"a": "b', "rows.json:2: not JSON: the file ends inside row 2, line 2 (truncated?)"),
        (f'[{GOOD},\n{{"a": ', "rows.json:2: not JSON: the file ends inside row 2, line 2 (truncated?)"),
        (f"[{GOOD},\n{GOOD}\n", "rows.json:2: not JSON: the file ends inside row 2, line 3 (truncated?)"),
        ("[", "rows.json:1: not JSON: the file ends inside row 1, line 1 (truncated?)"),
        (f"[{GOOD}]\n\n  {GOOD}", "not JSON at line 3, column 3: more stands after the list"),
        (f"[{GOOD}] {'[' * 50}", "not JSON at line 1, column 113: more stands after the list"),
        (f"\ufeff[{GOOD},\n{GOOD}, -]", "rows.json:3: not JSON at line 2, column 112: Expecting value"),
    ],
)  # fmt: skip
def test_the_place_of_an_error_is_true_in_every_chunk(tmp_path, monkeypatch, chunk, content, said):
    monkeypatch.setattr(text, "CHUNK", chunk)
    with pytest.raises(DataError) as error:
        raw(written(tmp_path, content))
    assert said in str(error.value)


@pytest.mark.parametrize("chunk", [*CHUNKS, 1 << 20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(("name", "first"), [("rows.json", b"["), ("rows.jsonl", b""), ("rows.csv", b"")])
def test_the_byte_that_is_not_utf8(tmp_path, monkeypatch, chunk, mark, name, first):
    monkeypatch.setattr(text, "CHUNK", chunk)
    before = mark + first + '"é🦙",\n"é",\n\n "🦙'.encode()
    path = written(tmp_path, before + b"\xe9\xe9 and so on\n\n" * 10, name)
    with pytest.raises(DataError, match=f": not UTF-8 at line 4, byte {len(before)}; convert it to UTF-8"):
        raw(path)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_character_that_is_cut_off_at_the_end(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    for content in (b'["' + "é🦙".encode()[:-1], b'["a"]  \xc3'):
        with pytest.raises(DataError, match="not UTF-8 at line 1"):
            raw(written(tmp_path, content))


# ----------------------------------------------------------------------------------------------------- five formats

USER, ANSWER = ("user", "Greet."), ("assistant", "Hello.")
SHAREGPT = [{"from": "human", "value": "Greet."}, {"from": "gpt", "value": "Hello."}]
MESSAGES = [{"role": "user", "content": "Greet."}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("row", "name", "said"),
    [
        (ROW, "Alpaca", [USER, ANSWER]),
        (ROW | {"system": "Be brief."}, "Alpaca", [("system", "Be brief."), USER, ANSWER]),
        (ROW | {"system": ""}, "Alpaca", [USER, ANSWER]),
        (ROW | {"system": None}, "Alpaca", [USER, ANSWER]),
        (ROW | {"text": "Below is an instruction"}, "Alpaca", [USER, ANSWER]),
        ({"conversations": SHAREGPT * 2}, "ShareGPT", [USER, ANSWER] * 2),
        ({"conversations": SHAREGPT, "system": "S"}, "ShareGPT", [("system", "S"), USER, ANSWER]),
        (
            {"conversations": [{"from": "system", "value": "S"}, *SHAREGPT]},
            "ShareGPT",
            [("system", "S"), USER, ANSWER],
        ),
        ({"messages": MESSAGES}, "messages", [USER, ANSWER]),
        (
            {"messages": [{"role": "developer", "content": "S"}, *MESSAGES * 2]},
            "messages",
            [("system", "S"), *[USER, ANSWER] * 2],
        ),
        ({"prompt": "Greet.", "completion": "Hello."}, "prompt/completion", [USER, ANSWER]),
        ({"text": "Hello."}, "text", [ANSWER]),
    ],
)
def test_five_formats_are_recognised(tmp_path, row, name, said):
    rows = Rows(written(tmp_path, json.dumps([row])))
    assert said_of(rows) == [said]
    assert rows.formats == {name: 1}


def test_a_text_is_a_document_and_a_completion_is_none(tmp_path):
    assert [row.is_document for row in Rows(written(tmp_path, '[{"text": "a"}]'))] == [True]
    assert [row.is_document for row in Rows(written(tmp_path, '[{"prompt": "a", "completion": "b"}]'))] == [False]


def test_input_may_be_missing_or_null(tmp_path):
    content = '[{"instruction": "a", "output": "b"}, {"instruction": "a", "input": null, "output": "b"}]'
    assert [row.question.input for row in Rows(written(tmp_path, content))] == ["", ""]


def test_fields_that_are_not_used_are_listed_once(tmp_path):
    rows = Rows(written(tmp_path, json.dumps([ROW | {"id": 1}, ROW | {"source": "x", "id": 2}])))
    assert rows.fields.lines() == ["fields that are not used: id, source"]


TURNS = [
    ([], "conversations is [], and not a list of turns"),
    ("Hello.", 'conversations is "Hello.", and not a list of turns'),
    (["Hello."], 'conversations[1] is "Hello.", and not an object with from and value'),
    ([{"from": "human"}], "conversations[1] is"),
    (
        [{"from": "narrator", "value": "x"}],
        'conversations[1]: from is "narrator", and not system, human, gpt, function_call or observation',
    ),
    ([{"from": 3, "value": "x"}], "conversations[1]: from is 3"),
    ([{"from": "human", "value": 3}], "conversations[1].value is 3, which is no text"),
    (SHAREGPT[:1], "conversations ends with a user turn, so there is no answer to learn"),
    (SHAREGPT[1:], "conversations[1]: an assistant turn at the beginning; a user turn belongs there"),
    ([*SHAREGPT, SHAREGPT[1]], "conversations[3]: an assistant turn after an assistant turn; a user turn belongs"),
    ([SHAREGPT[0], *SHAREGPT], "conversations[2]: a user turn after a user turn; an assistant turn belongs there"),
    ([*SHAREGPT, {"from": "system", "value": "x"}], "conversations[3]: a system turn after an assistant turn"),
    ([{"from": "system", "value": "x"}], "conversations ends with a system turn"),
]


@pytest.mark.parametrize(("turns", "said"), TURNS)
def test_turns_out_of_order_are_named(tmp_path, turns, said):
    assert f"rows.json:1: ShareGPT format: {said}" in refusal(written(tmp_path, json.dumps([{"conversations": turns}])))


def test_a_conversation_has_one_system_message(tmp_path):
    row = {"system": "S", "conversations": [{"from": "system", "value": "T"}, *SHAREGPT]}
    assert "system and conversations[1] are both system messages" in refusal(written(tmp_path, json.dumps([row])))


def test_messages_speak_of_role_and_content(tmp_path):
    said = refusal(written(tmp_path, json.dumps([{"messages": [{"role": "cat", "content": "x"}]}])))
    assert 'messages format: messages[1]: role is "cat", and not system, user, assistant or tool' in said


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("  \n ", "the file is empty"),
        ("[]", "contains 0 rows"),
        ("[{}, {}]", "contains 0 rows that can be used, and 2 that cannot; rows.json:1: the row has no fields"),
        (json.dumps([ROW, {}]), "rows.json:2: Alpaca format: no instruction; the row has no fields"),
        ("hello", "rows.json:1: not JSON at column 1: Expecting value, near 'hello'"),
        ('[{"instruction": "a",}]', "not JSON at line 1, column 22"),
        ('  {"instruction": "a",}', "rows.json:1: not JSON at column 23: Expecting property name"),
        ('[{"instruction": "a", "output": "b"}, {"instr', "truncated?"),
        (json.dumps(ROW) + '\n{"instruction": "a"', "rows.json:2: not JSON: the line ends inside the row"),
        (json.dumps(ROW) + '\n{"instruction": "a', "rows.json:2: not JSON: the line ends inside the row"),
        (json.dumps(ROW) * 2, "rows.json:1: not JSON at column 59: Extra data, near '{"),
        (b"\xff\xfe[\x00]\x00", "UTF-16"),
        ("[]".encode("utf-16-be"), "UTF-16"),
        (b'[{"instruction": "a",\n "output": "\xe9"}]', "not UTF-8 at line 2, byte 34"),
        ('[{"instruction": "a", "instruction": "b", "output": "c"}]', "'instruction' is given twice"),
        ('[{"instruction": "a", "output": NaN}]', "NaN is not JSON"),
        ('[{"instruction": "a", "output": -Infinity}]', "-Infinity is not JSON"),
        ('[{"instruction": "a", "output": ' + "9" * 5000 + "}]", "rows.json:1: a number of 5000 digits"),
        ('[{"instruction": "a", "output": "\\ud800"}]', "rows.json:1: Alpaca format: output holds half of a surrogate"),
        ('[{"instruction": "a", "output": null}]', "rows.json:1: Alpaca format: output is null"),
        ('[{"instruction": "a", "output": 3}]', "rows.json:1: Alpaca format: output is 3"),
        ('[{"instruction": "a", "output": ["b"]}]', 'rows.json:1: Alpaca format: output is ["b"], which is no text'),
        (json.dumps([ROW] * 3000 + [ROW | {"output": 1}]), "rows.json:3001: Alpaca format: output is 1"),
        ('[{"instrution": "a", "output": "b"}]', "did you mean instruction by 'instrution'? --columns instruction=ins"),
        ('[{"instruction": "a"}]', "rows.json:1: Alpaca format: no output; the row has 'instruction'; --columns out"),
        ('[{"quetsion": "a"}]', "rows.json:1: the row has 'quetsion'; expected instruction and output, conversations"),
        ('[{"instructions": "a"}]', "did you mean instruction by 'instructions'?"),
        ('[{"outp\\nut": "a", "instruction": "b"}]', "did you mean output by 'outp\\nut'? --columns output=NAME"),
        ('["text"]', 'rows.json:1: a row is an object with instruction and output, conversations, messages, prompt'),
        (json.dumps([ROW, ["text"]]), 'completion, or text, not ["text"]'),
        ('{"data": [1]}', "rows.json:1: the row has 'data'; expected"),
        ('{"data": [\n1]}', "rows.json: one object ('data'), not a list of rows"),
        (json.dumps(ROW, indent=2), "rows.json: one object ('instruction', 'input', 'output'), not a list of rows"),
        ('[{"instruction": "a", "output": ""}]', "the output of every row is empty"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "rows.json:1: nested too deeply"),
        ('[{"instruction": "a", "output": ' + "[" * 400 + "]" * 400 + "}]", "output is [[["),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_its_row(tmp_path, content, said):
    error = refusal(written(tmp_path, content))
    assert said in error
    assert "rows.json" in error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("instruction,output\n", "contains 0 rows"),
        ("instruction,instruction\na,b\n", "the header has a column name twice: 'instruction', 'instruction'"),
        ("instruction,output\na,b\nc\n", "rows.csv:3: 1 columns, and the header has 2, with commas between"),
        ('instruction,output\na,b\nc,"d\ne\n', "rows.csv:3: not CSV: unexpected end of data"),
        ('instruction,output\na,b\nc,"d"e\n', "rows.csv:3: not CSV: ',' expected after '\"'"),
        ("instruction,output\na,b\rc\n", "rows.csv:2: not CSV: new-line character seen in unquoted field"),
        ("instruction,output\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, content, said):
    error = refusal(written(tmp_path, content, "rows.csv"))
    assert said in error
    assert "rows.csv" in error


def test_a_field_of_a_table_may_be_long(tmp_path):
    rows = Rows(written(tmp_path, f"instruction,output\na,{'x' * 1_000_000}\n", "rows.csv"))
    assert [len(row.answers[0]) for row in rows] == [1_000_000]


def test_a_bad_parquet_file_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    whole = as_parquet([ROW] * 3)
    for content in (b"", b"PAR1", b"hello", whole[:-20], whole[:40] + b"\0" * 40 + whole[80:]):
        assert "rows.parquet" in refusal(written(tmp_path, content, "rows.parquet"))
    row = ROW | {"output": datetime.date(2023, 1, 1)}
    said = refusal(written(tmp_path, as_parquet([row]), "rows.parquet"))
    assert 'rows.parquet:1: Alpaca format: output is "2023-01-01", which is no text' in said
    texts = pyarrow.array([b"\xff"]).view(pyarrow.string())  # a text that is not UTF-8
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), table)
    assert "rows.parquet: not a Parquet file that can be read ('utf-8' codec can't decode" in refusal(
        written(tmp_path, table.getvalue(), "rows.parquet")
    )


@pytest.mark.parametrize("name", ["rows.json.gz", "rows.csv.gz", "rows.parquet.gz"])
def test_a_bad_archive_is_named(tmp_path, name):
    content = FORMS[name.removesuffix(".gz")]([ROW | {"output": os.urandom(3000).hex()} for _ in range(30)])
    whole = gzip.compress(content)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 100] = b"\xff" * 100
    for broken in (b"hello", whole[:-300], bytes(damaged)):
        assert name in refusal(written(tmp_path, broken, name))


@pytest.mark.parametrize("name", ["missing.json", "table.csv", "a/b/c", "/absolute/path", "rows.txt", "./a", "~/b"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "read_hub", lambda source: pytest.fail(f"looked for {source} on the hub"))
    assert "no such file" in refusal(name)


def test_a_folder_needs_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").mkdir()
    (tmp_path / "nobody" / "folder").mkdir(parents=True)
    written(tmp_path, "a", "rows.bak")
    for name in ("rows.json", "nobody/folder"):
        assert refusal(name) == f"--data_path {name}: a folder without a file that can be read"
    assert "--data_path rows.bak: a file of another kind; data is read from" in refusal("rows.bak")


def test_a_name_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "File name too long" in refusal("x" * 300 + ".json")
    assert "no such file" in refusal("/" + "x" * 300)


def test_nothing_but_commas():
    assert "contains 0 rows" in refusal(",")


def test_the_output_of_every_row_is_empty(tmp_path):
    assert "the output of every row is empty" in refusal(written(tmp_path, json.dumps([ROW | {"output": " \n"}] * 2)))


def test_empty_answers_and_blank_instructions_are_counted(tmp_path):
    rows = Rows(written(tmp_path, json.dumps([ROW, ROW | {"output": ""}, ROW | {"instruction": " \t"}])))
    assert (rows.empty_answers, rows.blank_instructions) == (["rows.json:2"], ["rows.json:3"])


# ----------------------------------------------------------------------------------------- columns and skipped rows


def test_columns_map_other_names(tmp_path):
    row = {"question": "Greet.", "answer": "Hello.", "instruction": 3, "id": 7}
    rows = Rows(written(tmp_path, json.dumps([row])), ["instruction=question", "output=answer"])
    assert said_of(rows) == [[USER, ANSWER]]
    assert rows.fields.harmless == {"id"}


def test_a_name_may_hold_an_equals_sign(tmp_path):
    assert len(Rows(written(tmp_path, '[{"a=b": "x"}]'), ["text=a=b"])) == 1


@pytest.mark.parametrize("pair", ["instruction", "instruction=", "question=instruction", "=a"])
def test_a_pair_that_is_none(data_path, pair):
    assert f"--columns {pair}: FIELD=COLUMN pairs are expected, and the fields are completion" in refusal(
        data_path, [pair]
    )


def test_a_field_mapped_twice(data_path):
    assert "--columns output=b: output is named twice, as a before" in refusal(data_path, ["output=a", "output=b"])


def test_a_mapped_column_that_is_missing(tmp_path):
    said = refusal(written(tmp_path, json.dumps([ROW])), ["output=answer"])
    assert "rows.json:1: Alpaca format: no output; the row has 'instruction', 'input'" in said


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_bad_rows_are_skipped_and_counted(tmp_path, name):
    bad = ['{"instruction": "a", "output": NaN}', '{"instruction": "a"}', '{"output": 1, "output": 2}', "3", "{}"]
    rows = [bad[0], json.dumps(ROW), *bad[1:], json.dumps(ROW)]
    content = f"[{', '.join(rows)}]" if name == "rows.json" else "\n".join(rows)
    path = written(tmp_path, content, name)
    read = Rows(path, skip_bad_rows=True)
    assert [row.where for row in read] == [f"{name}:2", f"{name}:7"]
    assert [where for where, _ in read.dropped] == [f"{name}:{number}" for number in (1, 3, 4, 5, 6)]
    assert read.dropped[0] == (f"{name}:1", "NaN is not JSON; write null or a number")
    assert f"{name}:1: NaN is not JSON" in refusal(path)


def test_a_first_line_that_is_cut_takes_no_other_with_it(tmp_path):
    lines = ['{"instruction": "a", "output":', *[json.dumps(ROW)] * 3]
    rows = Rows(written(tmp_path, "\n".join(lines)), skip_bad_rows=True)
    assert len(rows) == 3
    assert [where for where, _ in rows.dropped] == ["rows.json:1"]


def test_only_bad_rows(tmp_path):
    said = refusal(written(tmp_path, '{"instruction": 1, "output": "a"}\n3\n'), skip_bad_rows=True)
    assert "contains 0 rows that can be used, and 2 that cannot; rows.json:1: Alpaca format: instruction is 1" in said


# ---------------------------------------------------------------------------------------------- twice the same rows


def test_rows_can_be_read_again_and_again(data_path):
    rows = Rows(str(data_path))
    assert list(rows) == list(rows)
    assert len(rows.keys) == len(rows) == len(list(rows))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: [*rows[:2], rows[2] | {"output": "Other."}, *rows[3:]], "rows.json:3: this row changed while"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "rows.json:1: this row changed while the data was read"),
        (lambda rows: [*rows, rows[0]], "rows.json:6: this row changed while the data was read"),
        (lambda rows: rows[:-1], "5 rows, and now 4: the data changed; start again"),
        (lambda rows: [*rows[:-1], {"instruction": "a"}], "rows.json:5: Alpaca format: no output"),
    ],
)
def test_rows_that_change_between_two_readings(tmp_path, change, said):
    content = [ROW | {"output": str(number)} for number in range(5)]
    rows = Rows(written(tmp_path, json.dumps(content)))
    written(tmp_path, json.dumps(change(content)))
    with pytest.raises(DataError) as error:
        list(rows)
    assert said in str(error.value)


def test_the_digest_is_that_of_the_texts(tmp_path):
    def digest(rows, name="rows.json"):
        return Rows(written(tmp_path, FORMS[name](rows), name)).digest

    assert digest([ROW, ROW]) == digest([ROW, ROW], "rows.csv") == digest([ROW | {"id": 1}, ROW])
    others = [ROW], [ROW, ROW | {"input": "x"}], [ROW, ROW | {"output": "x"}], [ROW, ROW | {"system": "x"}]
    assert len({digest([ROW, ROW]), *map(digest, others)}) == 5


def test_equal_rows_have_equal_keys(tmp_path):
    one = ROW | {"instruction": "a\n\nb"}
    other = ROW | {"instruction": "a", "input": "b"}  # another row, which some templates make the same prompt of
    keys = Rows(written(tmp_path, json.dumps([one, other, one, ROW]))).keys
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3


# -------------------------------------------------------------------------------------------------------------- hub


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("squad", ("squad", None, "train", None)),
        ("yahma/alpaca-cleaned", ("yahma/alpaca-cleaned", None, "train", None)),
        ("org/name:config", ("org/name", "config", "train", None)),
        ("org/name:config:test", ("org/name", "config", "test", None)),
        ("org/name::validation", ("org/name", None, "validation", None)),
        ("org/name::train[:10%]", ("org/name", None, "train[:10%]", None)),
        ("org/name@main", ("org/name", None, "train", "main")),
        ("org/name:config:test@refs/pr/1", ("org/name", "config", "test", "refs/pr/1")),
    ],
)
def test_a_hub_id_has_config_split_and_revision(monkeypatch, source, arguments):
    import datasets

    asked = []

    def load_dataset(path, name=None, *, split, revision):
        asked.append((path, name, split, revision))
        return [ROW, ROW]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = Rows(source)
    assert asked == [arguments]
    assert [row.where for row in rows] == [f"{source}:1", f"{source}:2"]


def test_the_commit_of_a_hub_dataset_is_known(monkeypatch):
    import datasets

    commit = "0123456789abcdef0123456789abcdef01234567"
    rows = datasets.Dataset.from_list([ROW, ROW])
    rows.info.download_checksums = {f"hf://datasets/org/name@{commit}/rows.json": {"num_bytes": 1, "checksum": None}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert Rows("org/name").revisions == {"org/name": commit}


def test_a_hub_id_offline_says_what_to_pass():
    with pytest.raises(DataError, match=r"--data_path nobody/nothing: not a local file.*pass a \.json file"):
        Rows("nobody/nothing")


# -------------------------------------------------------------------------------------------------------- held out


def test_the_split_depends_on_the_seed_alone():
    validation = held_out(100, 20, seed=1)
    assert held_out(100, 20, seed=1) == validation
    assert held_out(100, 20, seed=2) != validation
    assert validation < set(range(100))
    assert len(validation) == 20


@pytest.mark.parametrize(
    ("rows", "val_set_size", "size"),
    [(100, None, 10), (30_000, None, 2000), (9, None, 0), (100, 0.25, 25), (101, 0.25, 26), (100, 0, 0), (9, 8.0, 8)],
)
def test_split_sizes(rows, val_set_size, size):
    assert len(held_out(rows, val_set_size, 42)) == size


@pytest.mark.parametrize(
    ("rows", "val_set_size", "said"),
    [
        (50, 2000, "--val_set_size 2000: there are only 50 rows, and none would be left to train on"),
        (50, 50.0, "--val_set_size 50: there are only 50 rows"),
        (2, 0.9, "--val_set_size 0.9 of the rows, which is 2: there are only 2 rows"),
    ],
)
def test_a_split_larger_than_the_data(rows, val_set_size, said):
    with pytest.raises(DataError) as error:
        held_out(rows, val_set_size, 42)
    assert said in str(error.value)
