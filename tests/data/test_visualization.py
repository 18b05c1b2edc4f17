import json
import os
import re
import shutil

import pytest
from command import refused, run

ROW = {"instruction": "Greet <b>.", "input": "", "output": "Hello & 🦙."}


@pytest.fixture
def words(tmp_path, tiny_llama, monkeypatch):
    """Return the words of a command that shows rows of a file."""
    monkeypatch.chdir(tmp_path)
    rows = [ROW | {"output": f"Hello & 🦙 number {number}."} for number in range(120)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return ("--data_path", "rows.json", "--base_model", tiny_llama, "--prompt_template_name", "alpaca_short")


def test_a_row_without_colours(words):
    said = run("show", *words, "--row", 3).out
    assert said.startswith("rows.json:3: ")
    [learned] = re.findall("\u27e6([^\u27e7]*)\u27e7\n*$", said)
    assert learned.replace("|", "") == "Hello & 🦙 number 2.</s>"
    seen = said.split("\n", 1)[1].partition("\u27e6")[0]
    assert seen.replace("<s> ", "<s>") == "<s>### Instruction:\nGreet <b>.\n\n### Response:\n"


def test_a_row_in_colours(words, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    said = run("show", *words).out
    learned = re.findall(r"\033\[30;(?:42|102)m([^\033]*)\033\[0m", said)
    assert learned[0] == "learned"  # the legend
    assert "".join(learned[1:]) == "Hello & 🦙 number 0.</s>"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run("show", *words).out


def test_what_is_cut_is_shown(words):
    whole = run("show", *words).out
    count = int(re.search(r"(\d+) tokens", whole)[1])
    said = run("show", *words, "--cutoff_len", count - 2).out
    assert "2 cut off" in said
    assert re.search("\u27e8[^\u27e9]*</s>\u27e9", said)


def test_several_rows_and_the_numbers_that_are_not_there(words):
    said = run("show", *words, "--row", "2,5").out
    assert re.findall(r"^rows\.json:(\d+)", said, re.MULTILINE) == ["2", "5"]
    for row in ("0", "121", "x"):
        assert "the rows have the numbers 1 to 120" in refused("show", *words, "--row", row)


def test_the_page_is_self_contained_and_what_rows_hold_is_text(words, tmp_path):
    assert "100 rows written to page.html" in run("show", *words, "--html", "page.html").out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 100
    assert "Greet &lt;b&gt;" in page
    assert "<b>" not in page
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    learned = re.findall(r'<span class="learned">([^<]*)</span>', page.partition("<pre>")[2].partition("</pre>")[0])
    assert "".join(learned) == "Hello &amp; 🦙 number 0.&lt;/s&gt;"
    assert "1 rows written" in run("show", *words, "--html", "page.html", "--row", 7).out  # its own may be replaced


def test_nothing_else_is_written_over(words, tmp_path):
    before = (tmp_path / "rows.json").read_bytes()
    assert "there is something else" in refused("show", *words, "--html", "rows.json")
    assert (tmp_path / "rows.json").read_bytes() == before
    for name, leads_to in (("to_page", "page.html"), ("to_rows", "rows.json"), ("dangling", "new"), ("loop", "loop")):
        (tmp_path / name).symlink_to(leads_to)
        assert "there is something else" in refused("show", *words, "--html", name)
    os.mkfifo(tmp_path / "pipe")
    assert "there is something else" in refused("show", *words, "--html", "pipe")
    assert "does not exist" in refused("show", *words, "--html", "nowhere/page.html")


def test_with_nothing_said_it_shows_the_demo():
    assert run("show").out.startswith("train.json:1: ")


# ------------------------------------------------------------------------------------------- documents, and the rest


def test_documents_are_not_said_to_be_cut(words, tmp_path):
    (tmp_path / "notes.txt").write_text("Alpacas hum. " * 100)
    said = run("show", "--data_path", "notes.txt", *words[2:4], "--cutoff_len", 64).out
    heading, body = said.split("\n", 1)
    assert re.match(
        r"notes\.txt:1: \d+ tokens; documents are put end to end and learned in blocks of --cutoff_len 64 ", heading
    )
    assert "cut off" not in heading
    assert "\u27e8" not in body  # nothing is struck out
    assert body.replace("|", "").count("Alpacas hum.") == 100
    run("show", "--data_path", "notes.txt", *words[2:4], "--cutoff_len", 64, "--html", "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'class="cut">A' not in page
    assert "learned in blocks of --cutoff_len 64" in page


def test_documents_among_rows_are_rows(words, tmp_path):
    """Training puts documents end to end only where there is nothing else."""
    (tmp_path / "notes.txt").write_text("Alpacas hum. " * 100)
    (tmp_path / "more.json").write_text(json.dumps([{"prompt": "Alpacas", "completion": " hum."}]))
    said = run("show", "--data_path", "notes.txt,more.json", *words[2:4], "--cutoff_len", 64).out
    assert "cut off at --cutoff_len 64" in said


@pytest.mark.parametrize(("overlong", "what"), [("drop", "the row is dropped"), ("error", "an error")])
def test_a_row_that_is_dropped_is_struck_out(words, overlong, what):
    said = run("show", *words, "--cutoff_len", 8, "--overlong", overlong).out
    assert re.match(rf"rows\.json:1: \d+ tokens, more than --cutoff_len 8: {what} \(--overlong {overlong}\) ", said)
    assert re.search("\n\u27e8[^\u27e7]*\u27e9$", said.rstrip("\n"))


def test_what_a_template_writes_behind_the_end_is_not_called_cut(tmp_path, tiny_llama, monkeypatch):
    """Its newline behind the end token is seen, not learned; it is cut off only where the row is too long."""
    monkeypatch.chdir(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '\n### ' + m.role + '\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n### assistant\n' }}{% endif %}"
    )
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tokenizer.save_pretrained(base)
    (tmp_path / "rows.json").write_text(json.dumps([ROW]))
    words = ("--data_path", "rows.json", "--base_model", base, "--prompt_template_name", "chat")
    whole = run("show", *words).out
    count = int(re.match(r"rows\.json:1: (\d+) tokens, \d+ of them learned   ", whole)[1])
    assert "cut off" not in whole.split("\n")[0]
    assert whole.rstrip("\n").endswith("</s>\u27e7")
    assert "1 cut off" in run("show", *words, "--cutoff_len", count - 1).out


# ------------------------------------------------------------------------------------------------- control characters

HOSTILE = "a\x1b]0;owned\x07b\x9bc\u202ed\u2066e\x00f\rg\U000e0041h\n\ti"
SHOWN = r"a\x1b]0;owned\x07b\x9bc\u202ed\u2066e\x00f\rg\U000e0041h" + "\n\ti"


@pytest.mark.parametrize("colours", [True, False])
def test_control_characters_of_rows_are_shown(words, tmp_path, colours, monkeypatch):
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "b\x1bs.json").write_text(json.dumps([ROW | {"instruction": HOSTILE, "output": HOSTILE}]))
    said = run("show", "--data_path", "b\x1bs.json", *words[2:]).out
    assert said.startswith(r"b\x1bs.json:1: ")
    plain = re.sub(r"\033\[[0-9;]*m", "", said) if colours else said
    assert not set(plain) & set("\x1b\x07\x9b\u202e\u2066\x00\r\U000e0041")
    assert SHOWN in plain.replace("|", "")  # in the prompt
    assert plain.replace("|", "").count(r"\u202ed\u2066e\x00") == 2
    run("show", "--data_path", "b\x1bs.json", *words[2:], "--html", "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not set(page) & set("\x1b\x07\x9b\u202e\u2066\x00\r\U000e0041")


def test_control_characters_in_errors_are_shown(words, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"outp\x1b[2J\u202eut": "a"}]))
    line = refused("show", *words)
    assert line.isprintable()
    assert r"\x1b[2J\u202eut" in line
    assert r"no\x1b\u202e.json: no such file" in refused("show", "--data_path", "no\x1b\u202e.json")
