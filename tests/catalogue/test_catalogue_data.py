"""The catalogue of bad inputs, data (A) and templates (B): each is refused in one line, or does what it should.

What is refused goes through the command line, in this process; no model may be loaded before.
"""

import codecs
import importlib
import json
import os
import re
import resource
from pathlib import Path

import pytest
from command import error_line, refused, run
from entries import ENTRIES, cases, entry
from faults import programme
from forms import FORMS

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.config.shared import DataOptions
from lora_alpaca.data import Rows
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.preparation import prepare
from lora_alpaca.data.readers.files import read_file
from lora_alpaca.errors import DataError, ModelError
from lora_alpaca.prompts import Conversation, load_template
from lora_alpaca.storage import atomic, output_folder

ROW = {"instruction": "Greet.", "input": "", "output": "Hello."}
LINE = json.dumps(ROW)

pytestmark = pytest.mark.usefixtures("here")  # no model may be loaded


def written(tmp_path, content, name="rows.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused_data(path, *flags):
    return refused("finetune", "--data_path", path, *flags)


# -------------------------------------------------------------------------------------------- A. files that are bad

BAD_FILES = [
    ("A02", "rows.json", "", "rows.json: the file is empty"),
    ("A02", "rows.jsonl", "", "rows.jsonl: the file is empty"),
    ("A02", "rows.csv", "", "rows.csv: the file is empty"),
    ("A03", "rows.json", " \n\t ", "it contains 0 rows"),
    ("A03", "rows.json", "[]", "rows.json: contains 0 rows"),
    ("A03", "rows.json", "[{},{}]", "contains 0 rows that can be used, and 2 that cannot; rows.json:1: "),
    ("A04", "rows.json", "hello, world", "rows.json:1: not JSON at column 1: Expecting value, near 'hello, world'"),
    ("A04", "rows.json", f"[{LINE}, hello]", "rows.json:2: not JSON at line 1, column 62: Expecting value, near 'he"),
    ("A05", "rows.json", f"[{LINE},\n]", "rows.json:1: not JSON at line 2, column 1: a row is missing after the comma"),
    ("A05", "rows.json", '[{"instruction": "a",}]', "rows.json:1: not JSON at line 1, column 22: "),
    ("A07", "rows.json", f"[{LINE}]".encode("utf-16"), "rows.json: looks like UTF-16 or UTF-32; convert it to UTF-8"),
    ("A07", "rows.json", f"[{LINE}]".encode("utf-16-le"), "looks like UTF-16 or UTF-32; convert it to UTF-8"),
    ("A07", "rows.jsonl", LINE.encode("utf-32"), "looks like UTF-16 or UTF-32; convert it to UTF-8"),
    ("A07", "rows.csv", "text\na\n".encode("utf-16-be"), "looks like UTF-16 or UTF-32; convert it to UTF-8"),
    ("A08", "rows.json", b'[\n{"text": "caf\xe9"}]', "rows.json: not UTF-8 at line 2, byte 15; convert it to UTF-8"),
    ("A08", "rows.jsonl", b'{"text": "caf\xe9"}', "rows.jsonl: not UTF-8 at line 1, byte 13; convert it to UTF-8"),
    ("A10", "rows.json", f"[{LINE},\n{LINE[:-5]}", "rows.json:2: not JSON: the file ends inside row 2, line 2 (trunc"),
    ("A11", "rows.jsonl", f"{LINE}\n{LINE[:-5]}", "rows.jsonl:2: not JSON: the line ends inside the row"),
    ("A12", "rows.jsonl", f"{LINE}\n\n{LINE}\noops\n{LINE}\n", "rows.jsonl:4: not JSON at column 1: Expecting value"),
    ("A14", "rows.bak", LINE, "rows.bak: a file of another kind; data is read from .json, .jsonl, .ndjson, .csv,"),
    ("A14", "rows.xlsx", "PK", "rows.xlsx: a workbook of a spreadsheet; save it as CSV UTF-8"),
    ("A15", "rows.json", f'[{LINE}, {{"instruction": "a"}}]', "rows.json:2: Alpaca format: no output; the row has 'in"),
    ("A16", "rows.json", '[{"instrution": "a", "output": "b"}]', "rows.json:1: Alpaca format: no instruction; the row "
     "has 'instrution', 'output'; did you mean instruction by 'instrution'? --columns instruction=instrution"),
    ("A18", "rows.json", json.dumps([ROW | {"output": None}]), "rows.json:1: Alpaca format: output is null, which is "),
    ("A19", "rows.json", json.dumps([ROW | {"output": 3.5}]), "rows.json:1: Alpaca format: output is 3.5, which is no"),
    ("A19", "rows.json", json.dumps([ROW, ROW | {"output": True}]), "rows.json:2: Alpaca format: output is true"),
    ("A19", "rows.jsonl", json.dumps(ROW | {"output": ["a"]}), 'rows.jsonl:1: Alpaca format: output is ["a"], which'),
    ("A19", "rows.json", json.dumps([ROW | {"input": {}}]), "rows.json:1: Alpaca format: input is {}, which"),
    ("A20", "rows.json", json.dumps([ROW] * 3000 + [ROW | {"output": 7}]), "rows.json:3001: Alpaca format: output is"),
    ("A22", "rows.json", f'[{LINE}, {{"output": "a", "output": "b"}}]', "rows.json:2: the key 'output' is given twice"),
    ("A23", "rows.json", '[{"instruction": "a", "output": NaN}]', "rows.json:1: NaN is not JSON"),
    ("A23", "rows.jsonl", f'{LINE}\n{{"text": -Infinity}}', "rows.jsonl:2: -Infinity is not JSON"),
    ("A24", "rows.json", '[{"text": "abc\\ud800def"}]', "rows.json:1: text format: text holds half of a surro"),
    ("A24", "rows.jsonl", '{"text": "abc\\ud800def"}', "rows.jsonl:1: text format: text holds half of a surro"),
    ("A25", "rows.json", '[{"text": "a\x01b"}]', "rows.json:1: not JSON at line 1, column 13: Invalid control char"),
    ("A25", "rows.jsonl", '{"text": "a\x00b"}', "rows.jsonl:1: not JSON at column 12: Invalid control character"),
    ("A26", "rows.json", f'{{"data": [{LINE}]}}', "rows.json:1: the row has 'data'; expected instruction and output"),
    ("A26", "rows.json", f'{{\n"data": [{LINE}]}}', "rows.json: one object ('data'), not a list of rows; write [{...}"),
    ("A26", "rows.json", json.dumps(ROW, indent=1), "rows.json: one object ('instruction', 'input', 'output'), not"),
    ("A26", "rows.json", '["a"]', "rows.json:1: a row is an object with instruction and output, conversations, messag"),
    ("A26", "rows.json", '[["a", "b"]]', 'or text, not ["a", "b"]'),
    ("A28", "rows.json", "[" * 100_000, "rows.json:1: nested too deeply"),
    ("A28", "rows.jsonl", f"{LINE}\n" + '{"a":' * 100_000, "rows.jsonl:2: nested too deeply"),
    ("A29", "rows.json", f'[{LINE}, {{"text": {"9" * 5000}}}]', "rows.json:2: a number of 5000 digits; write it as"),
    ("A29", "rows.jsonl", f'{LINE}\n{{"text": 1e999}}', "rows.jsonl:2: the number 1e999 is too large; write it as"),
    ("A30", "rows.json", json.dumps([ROW | {"output": ""}] * 3), "rows.json: the output of every row is empty"),
]  # fmt: skip


@cases(BAD_FILES, "name, content, said")
def test_a_bad_file_is_refused(tmp_path, name, content, said):
    assert said in refused_data(written(tmp_path, content, name))


@entry("A01")
def test_no_file(tmp_path, monkeypatch, number):
    (tmp_path / "folder.json").mkdir()
    assert refused_data(tmp_path / "none.json").endswith("none.json: no such file")
    without = "a folder without a file that can be read"
    assert refused_data(tmp_path / "folder.json").endswith(f"folder.json: {without}")
    assert refused_data(tmp_path).endswith(f"{tmp_path}: {without} (left out: folder.json (a folder), here (a folder))")

    def deny(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(
        "lora_alpaca.data.readers.files.open", deny, raising=False
    )  # the superuser is permitted everything
    assert refused_data(written(tmp_path, LINE)).endswith("rows.json: Permission denied")


@entry("A44")
def test_no_regular_file(tmp_path, number):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    for name in ("pipe.json", "zero.json", "loop.json"):
        assert refused_data(tmp_path / name).endswith(f"{name}: not a regular file")
    assert "/dev/zero: a file of another kind" in refused_data("/dev/zero")


@entry("A45")
def test_a_hub_id_offline(number):
    said = r"error: --data_path nobody/nothing: not a local file, and the hub gives none \(.+\); pass a \.json file"
    assert re.fullmatch(said, refused_data("nobody/nothing"))


# ------------------------------------------------------------------------------------------ A. files that are good


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("rows.json", codecs.BOM_UTF8 + f"[{LINE}, {LINE}]".encode(), id="A06"),
        pytest.param("rows.jsonl", codecs.BOM_UTF8 + f"{LINE}\n{LINE}".encode(), id="A06"),
        pytest.param("rows.jsonl", f"{LINE}\r\n\r\n  \n{LINE}", id="A09"),
        pytest.param("rows.json", f"[\r\n{LINE},\r\n{LINE}]", id="A09"),
        pytest.param("rows.jsonl", f"[{LINE}, {LINE}]", id="A13"),
        pytest.param("rows.json", f"{LINE}\n{LINE}\n", id="A13"),
        pytest.param("ROWS.JSON", f"{LINE}\n{LINE}\n", id="A14"),
    ],
)
def test_a_good_file_is_read(tmp_path, name, content):
    assert [(row.question.text, row.answers) for row in Rows(str(written(tmp_path, content, name)))] == [
        ("Greet.", ["Hello."])
    ] * 2


ENTRIES.update({"A06", "A09", "A13"})


@entry("A14")
def test_an_archive_is_read(tmp_path, number):
    import gzip

    assert len(Rows(str(written(tmp_path, gzip.compress(f"[{LINE}, {LINE}]".encode()), "rows.json.gz")))) == 2


@entry("A11")
def test_a_truncated_last_line_can_be_skipped(tmp_path, number):
    rows = Rows(str(written(tmp_path, f"{LINE}\n{LINE[:-5]}", "rows.jsonl")), skip_bad_rows=True)
    assert len(rows) == 1
    assert [where for where, _ in rows.dropped] == ["rows.jsonl:2"]


@entry("A18")
def test_bad_rows_can_be_skipped_and_are_counted(prepared, number):
    lines = prepared([ROW, ROW | {"output": None}], skip_bad_rows=True).statistics.lines()
    assert (
        "warning: 1 of 2 rows (50.0%) cannot be used and are dropped (first: rows.json:2: Alpaca format: "
        in "\n".join(lines)
    )


@entry("A17")
def test_extra_fields_are_listed_once(tmp_path, number, tiny_llama, monkeypatch):
    path = written(tmp_path, json.dumps([ROW | {"id": n, "source": "x"} for n in range(5)]))
    result = stopped_at_the_model(monkeypatch, path, tiny_llama)
    assert result.out.count("fields that are not used: id, source\n") == 1


@entry("A21")
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_dates_stay_text(tmp_path, number, name):
    texts = ["2023-01-01", "2023-01-01T00:00:00Z", "12:30", "1e5", "007", "true", "null"]
    path = written(tmp_path, FORMS[name]([ROW | {"output": text} for text in texts]), name)
    assert [row.answers for row in Rows(str(path))] == [[text] for text in texts]


@entry("A25")
def test_an_escaped_control_character_is_kept(tmp_path, number):
    rows = Rows(str(written(tmp_path, json.dumps([ROW | {"output": "a\0b\x01c"}]))))
    assert [row.answers for row in rows] == [["a\0b\x01c"]]


@entry("A27")
def test_a_line_of_100_megabytes(tmp_path, number):
    row = json.dumps(ROW | {"output": "alpaca ünd " * 8_400_000}, ensure_ascii=False)
    assert len(row.encode()) > 100e6
    assert len(Rows(str(written(tmp_path, f"[{row}]")))) == 1
    assert [value for _, value in read_file(written(tmp_path, row, "rows.jsonl"))] == [json.loads(row)]
    for path in tmp_path.glob("rows.*"):
        path.unlink()


@entry("A43")
@pytest.mark.parametrize("name", ["a b.json", "ünïcode 🦙.json", "new\nline.json", "a,b.json", "$HOME %s {x}.json"])
def test_strange_paths_work(tmp_path, monkeypatch, number, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Rows(str(written(tmp_path, LINE, name)))) == 1
    assert len(Rows(f"~/{name}")) == 1


# ---------------------------------------------------------------------------------------------- A. what becomes of it


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def prepared(tokenizer, tmp_path):
    """Return `prepared(rows, held_out=(), **options)`: examples and ledger, as training has them."""

    def make(rows, held_out=(), **options):
        options = DataOptions(**{"data_path": str(written(tmp_path, json.dumps(rows))), "cutoff_len": 128} | options)
        encoder = Encoder.from_options(tokenizer, load_template("alpaca_short"), options)
        return prepare(
            Rows(options.data_path, skip_bad_rows=options.skip_bad_rows),
            encoder,
            set(held_out),
            lambda done: None,
        )

    return make


def said_in(ledger):
    return "\n".join(ledger.lines())


def finetuned(data_path, base_model, *flags):
    """Run `finetune` up to where the model is loaded."""
    words = {"data_path": data_path, "base_model": base_model, "load_8bit": False, "cutoff_len": 128}
    output_dir = data_path.parent / "out"
    return run("finetune", "--output_dir", output_dir, *(f"--{name}={value}" for name, value in words.items()), *flags)


def stopped_at_the_model(monkeypatch, data_path, base_model, *flags):
    def load(*_, **__):
        raise ModelError("enough")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    result = finetuned(data_path, base_model, *flags)
    assert (result.code, result.err) == (1, "error: enough\n")
    return result


def refused_later(data_path, base_model, *flags):
    """Return the line that refuses what only a tokenizer can tell; something has been said before."""
    return error_line(finetuned(data_path, base_model, *flags), 2)


@entry("A30")
def test_empty_answers_are_counted(prepared, number):
    ledger = prepared([ROW, ROW | {"output": ""}, ROW | {"output": " \n"}]).statistics
    assert ledger.empty_answers.count == 2
    assert (
        "warning: 2 of 3 rows (66.7%) have an empty answer: they teach to say nothing (first: rows.json:2"
        in said_in(ledger)
    )


@entry("A31")
def test_blank_instructions_are_counted(prepared, number):
    ledger = prepared([ROW, ROW | {"instruction": " \n"}]).statistics
    assert "warning: 1 of 2 rows (50.0%) have a blank instruction (first: rows.json:2)" in said_in(ledger)


@entry("A32")
def test_prompts_that_fill_the_cutoff_are_dropped_and_counted(prepared, number):
    found = prepared([ROW, ROW | {"instruction": "Greet. " * 200}, ROW])
    assert len(found.train) == 2
    assert (
        "warning: 1 of 3 rows (33.3%) have a prompt of --cutoff_len 128 or more, so no answer is left; they are "
        "dropped (first: rows.json:2)" in said_in(found.statistics)
    )


@entry("A33")
def test_nothing_to_learn_in_any_row(tmp_path, number, tiny_llama):
    path = written(tmp_path, json.dumps([ROW | {"instruction": "Greet. " * 200}] * 3))
    said = refused_later(path, tiny_llama)
    assert "no row has anything to learn at --cutoff_len 128: 3 of 3 rows are dropped (first: rows.json:1)" in said


@entry("A34")
def test_a_cut_answer_is_counted_with_its_end_token(prepared, number, tokenizer):
    found = prepared([ROW, ROW | {"output": "Hello. " * 200}])
    assert [len(row.ids) for row in found.train][1] == 128
    assert found.train[1].labels[-1] not in (-100, tokenizer.eos_token_id)
    assert "warning: 1 of 2 rows (50.0%) are longer than --cutoff_len 128; they are cut" in said_in(found.statistics)
    assert "warning: 1 of 2 rows (50.0%) lose the end token of an answer in that (first: rows.json:2)" in said_in(
        found.statistics
    )


@entry("A35")
def test_control_tokens_in_a_text_stay_text(prepared, number, tokenizer):
    text = "</s> <|im_end|> <s>"
    found = prepared([ROW, {"instruction": text, "input": text, "output": text}])
    ids = found.train[1].ids.tolist()
    assert [token for token in ids if token in tokenizer.all_special_ids] == [
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ]
    assert tokenizer.decode(ids[1:-1]).count(text) == 3
    assert (
        "1 of 2 rows (50.0%) hold control tokens as text (like </s>); they stay text (first: rows.json:2)"
        in said_in(found.statistics)
    )


@entry("A36")
def test_a_marker_in_a_text_ends_nothing(prepared, number, tokenizer):
    text = "a\n\n### Response:\nb ### Response: c"
    row = prepared([{"instruction": text, "output": text}]).train[0]
    learned = [label for label in row.labels if label != -100]
    prompt = row.ids[: -len(learned)]
    assert tokenizer.decode(row.ids[1:-1]) == tokenizer.decode(prompt[1:]) + text
    assert load_template("alpaca_short").response(text) == text


TEXTS = [
    ("A37", "{instruction} {input} {0} {} {{x}} %s %(a)s $x \\n"),
    ("A38", "\u05e9\u05dc\u05d5\u05dd \u202eRTL\u202c zero\u200bwidth\u2060 🦙👩‍👩‍👧 e\u0301 \u00e9 ﬁ ①"),
]


@cases(TEXTS, "text")
def test_a_text_arrives_byte_for_byte(tmp_path, tokenizer, text):
    row = {"instruction": text, "input": text, "output": text}
    conversation = next(iter(Rows(str(written(tmp_path, json.dumps([row], ensure_ascii=False))))))
    template = load_template("alpaca_short")
    before, between, after = re.split(r"\{instruction\}|\{input\}", template.prompt_input)
    prompt = before + text + between + text + after
    assert [run.text for run in template.examples(conversation)[0]][:2] == [prompt, text]
    ids = Encoder.for_prompts(tokenizer, template).encode([conversation])[0].ids
    assert tokenizer.decode(ids[1:-1]) == prompt + text


@entry("A39")
def test_doubles_are_counted(prepared, number):
    others = [ROW | {"output": str(n)} for n in range(4)]
    ledger = prepared([ROW, *others, ROW, ROW], held_out=[5]).statistics
    assert "warning: 2 of 7 rows (28.6%) are exact doubles of an earlier one (first: rows.json:6)" in said_in(ledger)
    assert (
        "warning: 1 of 7 rows (14.3%) are in both the training and the validation part (first: rows.json:6"
        in said_in(ledger)
    )


@entry("A40")
def test_a_validation_part_that_cannot_be(data_path, tiny_llama, number):
    for size in ("48", "2000"):
        said = refused_later(data_path, tiny_llama, "--val_set_size", size)
        assert f"--val_set_size {size}: there are only 48 rows, and none would be left to train on" in said
    for size in ("-1", "1.5", "many"):
        assert f"--val_set_size {size}" in refused_data(data_path, "--val_set_size", size).replace("-1.0", "-1")


@entry("A40")
def test_a_share_is_a_share(data_path, tiny_llama, monkeypatch, number):
    result = stopped_at_the_model(monkeypatch, data_path, tiny_llama, "--val_set_size", "0.25")
    assert "48 rows read (48 in Alpaca format); 36 to train on, 12 to validate on" in result.out


@entry("A41")
def test_fewer_rows_than_a_batch_are_said(data_path, tiny_llama, monkeypatch, number):
    result = stopped_at_the_model(monkeypatch, data_path, tiny_llama, "--val_set_size", "0", "--batch_size", "64")
    assert "warning: 48 rows are fewer than --batch_size 64: every step is an epoch\n" in result.out


@pytest.fixture(scope="module")
def trained(tiny_llama, rows, tmp_path_factory):
    """Return the folder of a run of two steps, with its data beside it."""
    from conftest import as_row

    folder = tmp_path_factory.mktemp("trained")
    data_path = written(folder, json.dumps([as_row(row) for row in rows]))
    options = {"base_model": str(tiny_llama), "data_path": str(data_path), "output_dir": str(folder / "out")}
    finetune(FinetuneConfig(**options, max_steps=2, save_steps=1, batch_size=2, cutoff_len=128, load_8bit=False))
    return folder


@entry("A42")
def test_a_file_that_changes_before_a_resume(trained, tiny_llama, rows, number):
    record = output_folder.read_record(trained / "out")
    running = {key: value for key, value in record.items() if key != "files"} | {"status": "running"}
    atomic.replace(trained / "out" / output_folder.RECORD, atomic.as_json(running))
    content = json.loads((trained / "rows.json").read_text())
    changed = written(trained, json.dumps([*content[:-1], content[-1] | {"output": "changed"}]))
    result = finetuned(changed, tiny_llama, "--resume", "--max_steps", "2", "--batch_size", "2")
    atomic.replace(trained / "out" / output_folder.RECORD, atomic.as_json(record))
    assert result.code == 1
    assert re.fullmatch(r"error: --resume: this is another run \(.*data_sha256 was .+ and is .+\n", result.err)


@entry("A42")
def test_a_file_that_changes_while_it_is_read(tmp_path, number):
    rows = Rows(str(written(tmp_path, f"{LINE}\n{LINE}")))
    written(tmp_path, f"{LINE}\n{LINE.replace('Hello', 'Hallo')}")
    with pytest.raises(DataError, match=r"rows\.json:2: this row changed while the data was read; start again"):
        list(rows)


# --------------------------------------------------------------------------------------------------- B. templates

TEMPLATE = {"prompt_input": "{instruction} {input} Answer: ", "prompt_no_input": "{instruction} Answer: "} | {
    "response_split": "Answer:"
}


def without(key):
    return {name: value for name, value in TEMPLATE.items() if name != key}


BAD_TEMPLATES = [
    ("B47", "{\n}}", "mine.json: not JSON at line 2, column 2: Extra data"),
    ("B47", "[]", "mine.json: a template is an object with the keys prompt_input, prompt_no_input"),
    ("B48", without("prompt_input"), "mine.json: the key prompt_input is missing"),
    ("B48", without("prompt_no_input"), "mine.json: the key prompt_no_input is missing"),
    ("B48", without("response_split"), "mine.json: the key response_split is missing"),
    ("B49", TEMPLATE | {"prompt_no_input": "{instruction} {instruciton} Answer:"}, "prompt_no_input has {instruciton}"),
    ("B50", TEMPLATE | {"prompt_no_input": "Answer:"}, "mine.json: prompt_no_input has no {instruction}"),
    ("B50", TEMPLATE | {"prompt_input": "{input} Answer:"}, "mine.json: prompt_input has no {instruction}"),
    ("B52", TEMPLATE | {"prompt_no_input": "{instruction} {instruction.text} Answer:"}, "has {instruction.text}; only"),
    ("B52", TEMPLATE | {"prompt_no_input": "{instruction} {instruction:>9} Answer:"}, "has {instruction:>9}; only"),
    ("B52", TEMPLATE | {"prompt_no_input": "{instruction} {instruction!r} Answer:"}, "has {instruction!r}; only"),
    (
        "B54",
        TEMPLATE | {"response_split": "Reply:"},
        "mine.json: response_split 'Reply:' does not occur in prompt",
    ),
    ("B55", TEMPLATE | {"prompt_input": 3}, "mine.json: the key prompt_input is not a text"),
    ("B55", TEMPLATE | {"description": None}, "mine.json: the key description is not a text"),
]


@cases(BAD_TEMPLATES, "content, said")
def test_a_bad_template_is_refused(tmp_path, data_path, content, said):
    path = written(tmp_path, content if isinstance(content, str) else json.dumps(content), "mine.json")
    assert said in refused_data(data_path, "--prompt_template_name", path)


NAMES = [
    ("B46", "alpacca", "no template named 'alpacca'; there are alpaca, alpaca_legacy, alpaca_short, chat, chatml"),
    ("B53", "../../etc/x", "no template named '../../etc/x'; there are alpaca, "),
    ("B53", "/etc/passwd", "no template named '/etc/passwd'; there are alpaca, "),
    ("B53", "../templates/alpaca", "no template named '../templates/alpaca'; there are alpaca, "),
]


@cases(NAMES, "name, said")
def test_a_template_that_is_not_there(data_path, name, said):
    assert said in refused_data(data_path, "--prompt_template_name", name)


@entry("B51")
def test_braces_of_other_kinds_are_text(tmp_path, number):
    form = "{ } {} {0} {{x}} {instruction} Answer: "
    template = load_template(str(written(tmp_path, json.dumps(TEMPLATE | {"prompt_no_input": form}), "mine.json")))
    assert template.prompt(Conversation.of("{0}"))[0].text == "{ } {} {0} {{x}} {0} Answer: "


@entry("B56")
def test_another_template_than_in_training(trained, number):
    words = ("--instruction", "Hi.", "--lora_weights", trained / "out", "--prompt_template", "vigogne")
    result = run("generate", *words)
    assert (result.code, result.out) == (2, "")
    said = "error: --prompt_template vigogne: .*out was trained with alpaca, and vigogne is another prompt; leave .+"
    assert re.fullmatch(f"{said}\n", result.err)


@entry("B57")
@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_a_template_with_another_mark_or_other_line_ends(tmp_path, number, change):
    path = written(tmp_path, change(json.dumps(TEMPLATE, indent=4)), "mine.json")
    assert load_template(str(path)).prompt(Conversation.of("Hi."))[0].text == "Hi. Answer: "


# ------------------------------------------------------------------------------------------------------- the whole


def test_every_entry_has_its_test():
    """In one of these modules or, where a run has begun and needs a fault put into it, in a part of tests/faults."""
    for module in Path(__file__).parent.glob("test_catalogue_*.py"):
        importlib.import_module(module.stem)
    parts = {"A": (1, 45), "B": (46, 57), "C": (58, 80), "D": (81, 97), "E": (98, 106), "F": (107, 116)}
    catalogue = {f"{part}{n:02}" for part, (first, last) in parts.items() for n in range(first, last + 1)}
    in_runs = {entry for entries in programme.ENTRIES.values() for entry in entries}
    assert ENTRIES | in_runs == catalogue
    assert not ENTRIES & in_runs


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"[{LINE},\n]", "rows.json:1: not JSON at line 2, column 1: "),
        (json.dumps([ROW] * 3000 + [ROW | {"output": 7}]), "rows.json:3001: "),
        (f"[{LINE}]".encode("utf-16"), "looks like UTF-16"),
    ],
    ids=["A05", "A20", "A07"],
)
def test_a_refusal_is_quick(tmp_path, run_script, content, said):
    """Under two seconds of processor time, which is the time it takes on a machine that does nothing else."""
    path, seconds = written(tmp_path, content), []
    while len(seconds) < 3 and min(seconds, default=2) >= 2:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_script("finetune.py", "--data_path", path, cwd=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(f"error: .*{re.escape(said)}.*\n", done.stderr)
    assert min(seconds) < 2
