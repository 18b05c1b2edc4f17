"""What a --data_path may name, and every kind of file behind it: what is read, what is refused, what it may take."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from forms import as_arrow, as_csv, as_parquet

from lora_alpaca.data import Rows
from lora_alpaca.data.readers import arrow_rows, files, json_rows, text, unpacking
from lora_alpaca.data.readers.sources import open_sources
from lora_alpaca.errors import DataError

ROW = {"instruction": "Greet.", "input": "", "output": "Hello."}
LINE = json.dumps(ROW)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(name, content=LINE):
    """Write a file below the current folder, and return its name."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def refusal(name, **options):
    """Return the one line that says why there are no rows."""
    with pytest.raises(DataError) as error:
        Rows(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def pairs(name):
    return [(row.question.text, *row.answers) for row in Rows(name)]


def wheres(name):
    return [row.where for row in Rows(name)]


# -------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("name", ["notes.txt", "NOTES.MD", "notes.txt.gz"])
def test_a_file_of_text_is_one_document(name):
    document = "# Alpacas\r\n\nThey hum.\n\n  é 🦙 \u2028\n"
    content = document.encode()
    put(name, gzip.compress(content) if name.endswith(".gz") else b"\xef\xbb\xbf" + content)
    rows = Rows(name)
    assert [(row.answers, row.is_document, row.where) for row in rows] == [([document], True, f"{name}:1")]
    assert rows.formats == {"text": 1}


def test_documents_that_cannot_be_read_are_named():
    assert "notes.txt:1: the file is empty" in refusal(put("notes.txt", " \n"))
    assert "notes.txt: not UTF-8 at line 2, byte 5" in refusal(put("notes.txt", b"abc\nd\xe9"))
    assert "looks like UTF-16" in refusal(put("notes.txt", "abc".encode("utf-16")))
    put("all/b.txt", "Hum.")
    put("all/a.txt", "")
    rows = Rows("all", skip_bad_rows=True)
    assert (len(rows), rows.dropped) == (1, [("a.txt:1", "the file is empty")])


# ---------------------------------------------------------------------------------------------- folders and patterns


def test_a_folder_is_its_files_in_order():
    for name in ("b.jsonl", "a.json", "c.csv.gz"):
        table = gzip.compress(as_csv([ROW])) if "csv" in name else LINE
        put(f"data/{name}", table)
    put("data/.hidden.json", "broken")
    put("data/picture.png", "x")
    put("data/sub/d.json", "broken")
    put("elsewhere.json", "broken")
    Path("data/link.json").symlink_to(Path("elsewhere.json").resolve())
    Path("data/d.json").symlink_to("a.json")
    rows = Rows("data")
    assert [row.where for row in rows] == ["a.json:1", "b.jsonl:1", "c.csv.gz:2", "d.json:1"]
    assert rows.notes == [
        "rows are read from 4 sources: a.json, b.jsonl, c.csv.gz, d.json",
        "warning: data: left out: link.json (a link out of it), picture.png, sub (a folder)",
    ]


def test_a_pattern_is_the_files_that_it_matches():
    for name in ("data/b.jsonl", "data/a.jsonl", "data/.c.jsonl", "data/more/a.jsonl", "data/x.csv", "data[1].jsonl"):
        put(name)
    assert wheres("data/*.jsonl") == ["a.jsonl:1", "b.jsonl:1"]
    assert wheres("data/**/*.jsonl") == ["data/a.jsonl:1", "data/b.jsonl:1", "more/a.jsonl:1"]
    assert wheres("data/**/*.jsonl, data/b.jsonl")[-1] == "data/b.jsonl:1"
    assert wheres("data[1].jsonl") == ["data[1].jsonl:1"]  # a file may be called so
    assert wheres("data/[ab].jsonl") == ["a.jsonl:1", "b.jsonl:1"]
    put("many/a/rows.jsonl"), put("many/b.jsonl")
    assert wheres("many/**") == ["b.jsonl:1", "rows.jsonl:1"] or wheres("many/**") == ["rows.jsonl:1", "b.jsonl:1"]
    assert wheres("man*") == ["b.jsonl:1"]  # a folder, if it matches nothing else
    assert "--data_path data/*.json: no file matches this pattern" in refusal("data/*.json")


def test_files_of_one_name_are_told_apart():
    put("one/rows.json")
    put("two/rows.json", f"[{LINE}, {{}}]")
    assert "error" not in wheres("one/rows.json")
    assert "two/rows.json:2: " in refusal("one/rows.json,two/rows.json")


def test_a_folder_with_something_else_in_it_is_refused():
    put("clone/README.md", "# A dataset")
    put("clone/rows.jsonl")
    assert "both rows (rows.jsonl) and documents (README.md); name the files, or a pattern such as 'clone/*.jsonl'" in (
        refusal("clone")
    )
    for name in ("my-train.json", "my-test.json"):
        put(f"split/{name}")
    assert "several splits (my-test.json, my-train.json); name the files, or" in refusal("split")
    put("contest/a.json"), put("contest/latest.json"), put("contest/trained.json")
    assert len(Rows("contest")) == 3  # no words of their own
    put("empty/picture.png")
    assert refusal("empty").endswith("empty: a folder without a file that can be read (left out: picture.png)")


# ----------------------------------------------------------------------------------------------- datasets and arrow


def test_a_folder_of_save_to_disk_is_read_without_datasets():
    program = (
        "import datasets; d = datasets.Dataset.from_list([{'text': f'row {n}'} for n in range(2500)])\n"
        "d.save_to_disk('one', num_shards=2)\n"
        "datasets.DatasetDict(train=d.select(range(5)), test=d.select([7, 3])).save_to_disk('split')\n"
        "datasets.DatasetDict(test=d).save_to_disk('other')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert [row.answers[0] for row in Rows("one")] == [f"row {n}" for n in range(2500)]
    assert wheres("one")[1250] == "data-00001-of-00002.arrow:1"
    assert [row.answers for row in Rows("split")] == [[f"row {n}"] for n in range(5)]
    assert [row.answers for row in Rows("split:test")] == [["row 7"], ["row 3"]]
    assert len(Rows("one/data-00000-of-00002.arrow,split/test")) == 1252
    assert "--data_path split:dev: the folder has the splits train, test; say split:SPLIT" in refusal("split:dev")
    assert "--data_path other: the folder has the splits test; say other:SPLIT" in refusal("other")
    assert "--data_path one:train: the folder one has no splits; say its name alone" in refusal("one:train")


@pytest.mark.parametrize("entry", ["../rows.json", "/etc/passwd", 3, None])
def test_a_folder_of_save_to_disk_names_only_its_own_files(entry):
    put("rows.json")
    put("saved/dataset_info.json", "{}")
    put("saved/state.json", json.dumps({"_data_files": [{"filename": entry}]}))
    assert "state.json names no files of rows" in refusal("saved")
    put("split/dataset_dict.json", json.dumps({"splits": ["train", "../saved"]}))
    assert "the folder has the splits train, ../saved" in refusal("split:../saved")


@pytest.mark.parametrize("how", ["file", "stream", "dictionary", "gz"])
def test_an_arrow_file_may_be_a_file_or_a_stream(how):
    content = as_arrow([ROW] * 2500, stream=how == "stream", dictionary=how == "dictionary")
    name = put("rows.arrow.gz", gzip.compress(content)) if how == "gz" else put("rows.arrow", content)
    assert pairs(name) == [("Greet.", "Hello.")] * 2500


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_columns_of_arrow_are_refused_before_they_grow(stream, compression):
    for dictionary in (False, True):
        content = as_arrow([ROW] * 3, stream, dictionary, compression)
        assert "rows.arrow: an Arrow file with compressed columns; write it" in refusal(put("rows.arrow", content))


def test_every_message_of_a_compressed_file_is_known_as_that():
    import pyarrow

    for compression in ("lz4", "zstd", None):
        content = as_arrow([ROW] * 3, dictionary=True, compression=compression)
        kinds = {}
        for message in pyarrow.ipc.MessageReader.open_stream(pyarrow.py_buffer(content)):
            kinds.setdefault(message.type, set()).add(arrow_rows._is_compressed(message.metadata.to_pybytes()))
        assert kinds == {"schema": {False}, "dictionary": {bool(compression)}, "record batch": {bool(compression)}}


def test_numbers_that_point_out_of_an_arrow_file_are_found():
    import pyarrow

    offsets = pyarrow.array([0, 3, 1 << 30, 6], pyarrow.int32()).buffers()[1]
    wrong = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"abcdef"))
    with pyarrow.ipc.new_stream("rows.arrow", pyarrow.schema([("text", pyarrow.string())])) as writer:
        writer.write_batch(pyarrow.record_batch([wrong], ["text"]))
    assert "rows.arrow: not an Arrow file that can be read (In column 0: Invalid: " in refusal("rows.arrow")


def test_a_damaged_arrow_file_is_one_line():
    whole = as_arrow([ROW | {"output": "x" * 100}] * 30)
    for content in (b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:900] + b"\xff" * 99 + whole[999:]):
        assert "rows.arrow" in refusal(put("rows.arrow", content))


# ----------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("name", "mark"), [("rows.csv", ";"), ("rows.csv", "\t"), ("rows.csv", "|"), ("rows.tsv", "\t"), ("rows.tsv", ",")]
)
def test_the_header_tells_what_is_between_the_columns(name, mark):
    rows = [ROW | {"output": text} for text in ("Hello.", "a, b; c\td|e", "two\nlines")]
    content = as_csv(rows, mark)
    assert pairs(put(name, content)) == [("Greet.", row["output"]) for row in rows]
    assert pairs(put(name, f"sep={mark}\r\n".encode() + content)) == [("Greet.", row["output"]) for row in rows]


def test_a_header_that_is_not_plain_is_read_with_the_usual_separator():
    assert pairs(put("rows.csv", 'instruction,output,"a;b"\nGreet.,Hello.,x\n')) == [("Greet.", "Hello.")]
    assert pairs(put("rows.tsv", "instruction\toutput\ta, b\nGreet.\tHello.\tx\n")) == [("Greet.", "Hello.")]
    assert [row.answers for row in Rows(put("rows.csv", "text\na;b\n"))] == [["a;b"]]
    assert pairs(put("rows.csv", '"id, old";instruction;output\n1;Greet.;Hello.\n')) == [("Greet.", "Hello.")]
    assert "'instruction;output\\tscore'" in refusal(put("rows.csv", "instruction;output\tscore\na;b\tc\n"))


def test_errors_say_what_is_between_the_columns():
    assert "rows.csv:3: 2 columns, and the header has 3, with semicolons between" in refusal(
        put("rows.csv", "instruction;input;output\na;b;c\na;b\n")
    )


def test_columns_and_rows_that_a_spreadsheet_leaves_empty():
    lines = [
        "\ufeffinstruction,input,output,,",
        ",,,,",
        "Greet.,,Hello.,,",
        " ,,,,",
        "",
        "Greet.,,Bye.,,",
        *[",,,,"] * 2,
    ]
    table = "\r\n".join(lines) + "\r\n"
    rows = Rows(put("rows.csv", table))
    assert [(row.where, *row.answers) for row in rows] == [("rows.csv:3", "Hello."), ("rows.csv:6", "Bye.")]
    assert not rows.fields.lines()
    assert all(value.keys() == {"instruction", "input", "output"} for _, value in files.read_file(Path("rows.csv")))
    assert rows.notes == ["warning: rows.csv: 4 blank rows are left out"]
    assert len(list(rows)) == 2
    assert rows.notes == ["warning: rows.csv: 4 blank rows are left out"]  # of one reading


def test_columns_without_a_name_are_called_as_pandas_does():
    rows = Rows(put("rows.csv", ",instruction,output,\n0,Greet.,Hello.,\n1,Greet.,Bye.,x\n"))
    assert [row.answers for row in rows] == [["Hello."], ["Bye."]]
    assert rows.fields.harmless == {"Unnamed: 0", "Unnamed: 3"}
    assert "'Unnamed: 0', 'text', 'Unnamed: 0'" in refusal(put("rows.csv", ",text,Unnamed: 0\n"))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rows.xlsx", "a workbook of a spreadsheet; save it as CSV UTF-8"),
        ("ROWS.XLS", "a workbook"),
        ("rows.ods", "a workbook"),
        ("rows.zip", "an archive; unpack it"),
        ("rows.jsonl.zst", "an archive; unpack it"),
        ("rows.tar.gz", "a file of another kind"),
        ("rows.pkl", "a pickle, which may run code"),
        ("rows.sqlite", "a database; write its rows as"),
        ("rows.docx", "a document with markup; save its text as .txt"),
        ("rows.pdf", "a document with markup"),
        ("rows.yaml", "no list of rows; write them as .jsonl"),
        ("rows.npy", "arrays of numbers"),
        ("rows.feather", "columns in a compressed form; write it as .parquet"),
        ("rows", "a file of another kind; data is read from .json, .jsonl"),
    ],
)
def test_other_kinds_of_files_are_refused_with_the_way_on(name, said):
    assert refusal(put(name)).startswith(f"--data_path {name}: {said}")
    assert "no such file" in refusal("none" + name) or name == "rows"  # which might be on the hub


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.jsonl", "rows.txt", "rows.parquet", "rows.arrow"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04\x14\0\x06\0", "a zip archive or a workbook of a spreadsheet; unpack it, or save it as CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old workbook"),
        (gzip.compress(b"x", mtime=0), "compressed with gzip; its name must end in .gz"),
        (b"%PDF-1.4", "a PDF document"),
        (b"SQLite format 3\0", "a database"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS, not the data"),
    ],
)
def test_a_file_is_not_what_its_name_says(name, content, said):
    assert f"{name}: {said}" in refusal(put(name, content))
    assert f"{name}.gz: {said}" in refusal(put(f"{name}.gz", gzip.compress(content)))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("https://example.com/rows.json", "an address, and nothing is fetched from addresses; download it, and name"),
        ("http://example.com/a,b.json", "an address"),
        ("s3://bucket/rows.json", "an address, and nothing is fetched"),
        ("https://huggingface.co/datasets/some/thing/resolve/main/a.json", "named by its id, --data_path some/thing"),
        ("hf://datasets/some/thing@main/a.json", "a dataset of the hub is named by its id, --data_path some/thing"),
        ("file:///tmp/rows.json", "an address; say the path alone, /tmp/rows.json"),
    ],
)
def test_nothing_is_fetched_from_an_address(address, said, monkeypatch):
    monkeypatch.setattr(files, "read_hub", lambda source: pytest.fail(f"looked for {source} on the hub"))
    assert said in refusal(address)


# ------------------------------------------------------------------------------------------------- bounded growth


@pytest.fixture
def small(monkeypatch):
    """Make the limits small: 40 kB a row, 100 kB that an archive may grow to, 20 times, 90 kB of a copy."""
    monkeypatch.setattr(text, "MAX_ROW", 40_000)
    monkeypatch.setattr(text, "CHUNK", 1000)
    monkeypatch.setattr(unpacking, "FREE", 100_000)
    monkeypatch.setattr(unpacking, "GROWTH", 20)
    monkeypatch.setattr(unpacking, "MAX_COPY", 90_000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "head", "body", "tail", "row"),
    [
        ("rows.json", '[{"text": "a"}, {"text": "', "é", '"}]', 2),
        ("rows.json", '[{"text": "a"},', " ", '{"text": "b"}]', 2),
        ("rows.json", "", " " * 10, "[{}]", 1),
        ("rows.jsonl", '{"text": "a"}\n{"text": "', "é", '"}', 2),
        ("rows.csv", "text,id\na,1\n", "é", ",2", 3),
        ("rows.csv", 'text,id\na,1\n"', "é\n", '",2', 3),
        ("rows.csv", 'text,id\na,1\n"', '\n","', '",2', 3),
        ("rows.csv", "", "é,", "\na\n", 1),
        ("rows.txt", "", "é", "", 1),
    ],
)
def test_a_row_that_is_too_long_is_refused(name, head, body, tail, row, packed, monkeypatch):
    content = (head + body * 50_000 + tail).encode()
    monkeypatch.setattr(unpacking, "FREE", 10 * len(content))
    name = put(f"{name}.gz", gzip.compress(content)) if packed else put(name, content)
    said = "contains 0 rows" if content.endswith(b"[{}]") else f"{name}:{row}: this row is longer than"
    assert said in refusal(name)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_row_of_too_many_values_is_refused(name, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 1000)
    monkeypatch.setattr(json_rows, "_LARGE", 2000)
    monkeypatch.setattr(json_rows, "_MOST_VALUES", 1000)
    start, end = "[]" if name == "rows.json" else ("", "")
    good = '{"text": "' + '[,{\\"' * 2000 + '"}'  # in a text they are letters
    many = '{"text": [' + "[]," * 5000 + "[]]}"
    assert len(Rows(put(name, start + good + end))) == 1
    assert f"{name}:1: this row has more than 1,000 values; divide it" in refusal(put(name, start + many + end))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.txt", "rows.parquet", "rows.arrow"])
def test_a_row_of_nearly_the_limit_is_read(name):
    row = {"text": "é🦙 " * 5000}  # 35 kB
    content = {"rows.csv": as_csv, "rows.parquet": as_parquet, "rows.arrow": as_arrow}.get(
        name, lambda rows: (row["text"] if name == "rows.txt" else json.dumps(rows[0], ensure_ascii=False)).encode()
    )
    assert [read.answers[0] for read in Rows(put(name, content([row])))] == [row["text"]]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json"])
def test_an_archive_that_grows_too_much_is_refused(name):
    line = '{"text": "alpaca"}\n' if name != "rows.csv" else "alpaca\n"
    content = "".join({"rows.json": ["[", ",".join([line] * 20_000), "]"]}.get(name, [line * 20_000]))
    assert f"{name}.gz: grows to more than 20 times its size; unpack it yourself if you trust it" in refusal(
        put(f"{name}.gz", gzip.compress(content.encode())), columns=["text=alpaca"] if name == "rows.csv" else None
    )
    assert len(Rows(put(name, content), columns=["text=alpaca"] if name == "rows.csv" else None)) > 19_998


def test_a_copy_of_a_packed_table_is_limited_private_and_gone(small, monkeypatch):
    content = as_parquet([{"text": os.urandom(60_000).hex()}])
    assert "grows to more than 0 GB; unpack it first" in refusal(put("rows.parquet.gz", gzip.compress(content)))
    monkeypatch.setattr(unpacking, "MAX_COPY", 1 << 30)
    monkeypatch.setattr(text, "MAX_ROW", 1 << 20)
    monkeypatch.setenv("TMPDIR", str(Path.cwd()))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert len(Rows("rows.parquet.gz")) == 1
    assert os.listdir() == ["rows.parquet.gz"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("write", [as_parquet, as_arrow])
def test_rows_of_parquet_and_arrow_are_bounded_one_by_one(write, nested, monkeypatch):
    monkeypatch.setattr(text, "MAX_ROW", 40_000)
    monkeypatch.setattr(arrow_rows, "_BATCH", 1000)
    name = "rows.parquet" if write is as_parquet else "rows.arrow"
    texts = ["short", "x" * 41_000, "end"]
    rows = [{"messages": [{"role": "user", "content": t}]} if nested else {"text": t} for t in texts]
    read = [value for _, value in files.read_file(Path(put(name, write(rows))))]
    assert [read[0], read[2]] == [rows[0], rows[2]]
    assert read[1].reason.startswith("this row is longer than")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_a_text_that_is_stored_once_and_repeated_is_bounded(name, monkeypatch):
    monkeypatch.setattr(unpacking, "FREE", 1_000_000)
    rows = [{"text": "x" * 10_000}] * 10_000
    content = as_parquet(rows) if name == "rows.parquet" else as_arrow(rows, dictionary=True)
    assert f"{name}: grows to more than 200 times its size" in refusal(put(name, content))


@pytest.mark.parametrize("name", ["rows.json.gz", "rows.jsonl.gz", "rows.parquet"])
def test_the_memory_of_a_bomb_is_bounded(name):
    """Of 600 MB in one row, in an archive of 600 kB, or in rows of 100 MB, in a table of 3 kB."""
    if name == "rows.parquet":
        content = as_parquet([{"text": "x" * 100_000_000}] * 4, compression="zstd")
    else:
        piece = b"x" * (1 << 20)
        with gzip.open(name, "wb", 1) as file:
            file.write(b'[{"text": "' if name == "rows.json.gz" else b'{"text": "')
            for _ in range(600):
                file.write(piece)
        content = Path(name).read_bytes()
    put(name, content)
    program = (
        "import resource, sys\nfrom lora_alpaca.data import Rows\nfrom lora_alpaca.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        f"try:\n    print(len(Rows({name!r})))\nexcept DataError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-500:]
    expected = "grows to more than 200 times" if name == "rows.parquet" else ":1: this row is longer than 128 MB"
    assert expected in done.stdout


def test_sources_are_told_before_anything_is_read():
    assert [source.name for source in open_sources("some/dataset:config:split@main")[0]] == [
        "some/dataset:config:split@main"
    ]
    assert [source.name for source in open_sources("some/dataset:train[:10]")[0]] == ["some/dataset:train[:10]"]
