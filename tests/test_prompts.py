import json

import pytest

from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts import Conversation, Template, load_template, template_names

PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def test_the_alpaca_prompt_is_upstreams():
    template = load_template("alpaca")
    assert template.prompt("Do it.") == PREAMBLE + "### Instruction:\nDo it.\n\n### Response:\n"
    assert template.prompt("Do it.", "Now.").endswith("### Instruction:\nDo it.\n\n### Input:\nNow.\n\n### Response:\n")
    assert load_template("alpaca_legacy").prompt("Do it.") == template.prompt("Do it.")[:-1]


def test_shipped_templates():
    assert template_names() == ["alpaca", "alpaca_legacy", "alpaca_short", "vigogne"]
    for name in template_names():
        assert "a {input} b" in load_template(name).prompt("a {input} b", "c {instruction} d")


def test_substitution_is_one_pass():
    template = Template("t", "{instruction}|{input}|S", "{instruction}|S", "S")
    assert template.prompt("{input} {0} %s", "{instruction} {x") == "{input} {0} %s|{instruction} {x|S"


def test_render_is_prompt_answer_end():
    runs = load_template("alpaca").render(Conversation("I", "", "A"))
    assert [(run.text, run.learned) for run in runs[1:]] == [("A", True), (None, True)]
    assert runs[0].text == load_template("alpaca").prompt("I")
    assert not runs[0].learned


def test_an_answer_may_hold_the_marker():
    """Upstream splits the text on it: an IndexError, or half an answer."""
    text = " Write ### Response: twice, ### Response: like this. "
    assert load_template("alpaca").response(text) == text.strip()


def test_templates_are_not_looked_up_in_the_working_directory(tmp_path, monkeypatch):
    """Upstream reads templates/ relative to where one stands."""
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "alpaca.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert load_template("alpaca").response_split == "### Response:"


GOOD = {"prompt_input": "{instruction} {input} R:", "prompt_no_input": "{instruction} R:", "response_split": "R:"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_input": None}, "prompt_input is missing"),
        ({"response_split": 3}, "response_split is missing or not a text"),
        ({"prompt_no_input": "R:"}, "prompt_no_input has no {instruction}"),
        ({"prompt_input": "{instruction} R:"}, "prompt_input has no {input}"),
        ({"prompt_no_input": "{instruction} {instruciton} R:"}, "{instruciton}"),
        ({"prompt_no_input": "{instruction} {instruction.__class__} R:"}, "{instruction.__class__}"),
        ({"response_split": "Answer:"}, "does not occur in"),
    ],
)
def test_a_wrong_template_names_its_key(tmp_path, change, said):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(TemplateError) as error:
        load_template(str(path))
    assert said in str(error.value)
    assert "mine.json" in str(error.value)


@pytest.mark.parametrize("name", ["alpcaa", "../alpaca", "/etc/passwd", ""])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(TemplateError, match="alpaca, alpaca_legacy, alpaca_short, vigogne"):
        load_template(name)


def test_ones_own_template_with_literal_braces(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("\ufeff" + json.dumps(GOOD | {"prompt_no_input": '{"a": 1} {instruction} R:'}), encoding="utf-8")
    assert load_template(str(path)).prompt("x") == '{"a": 1} x R:'


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_file_that_is_no_template(tmp_path, text):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(TemplateError, match=r"mine\.json"):
        load_template(str(path))


def test_the_digest_is_of_what_shapes_a_prompt():
    one, other = load_template("alpaca"), load_template("alpaca_legacy")
    assert one.digest() != other.digest()
    again = Template.from_json(one.to_json() | {"name": "else", "description": "else"}, "x", "x")
    assert again.digest() == one.digest()
