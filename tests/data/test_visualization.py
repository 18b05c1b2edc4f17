import json
import re

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
    assert "does not exist" in refused("show", *words, "--html", "nowhere/page.html")


def test_with_nothing_said_it_shows_the_demo():
    assert run("show").out.startswith("train.json:1: ")
