"""The web page without a browser: what its controls hand on, what it shows beside answers, and its examples."""

import html
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio")

import scripted_page  # noqa: E402
from scripted_page import TABS, Page, Scripted, demo_tokenizer, generator_of  # noqa: E402

from lora_alpaca.artifacts import privacy  # noqa: E402
from lora_alpaca.config import FinetuneConfig, GenerateConfig  # noqa: E402
from lora_alpaca.data import Rows, held_out  # noqa: E402
from lora_alpaca.inference import page as page_package  # noqa: E402
from lora_alpaca.inference.generator import Generator  # noqa: E402
from lora_alpaca.inference.page import theme  # noqa: E402
from lora_alpaca.inference.page.examples import Examples  # noqa: E402
from lora_alpaca.inference.page.layout import build, described  # noqa: E402
from lora_alpaca.inference.sampling import Sampling  # noqa: E402


@pytest.fixture(autouse=True)
def closed_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with scripted_page.closed_and_quick(monkeypatch):
        yield


@pytest.fixture
def tokenizer() -> Any:
    return demo_tokenizer()


@pytest.fixture
def scripted() -> Scripted:
    return Scripted(demo_tokenizer())


# -------------------------------------------------------------------------------------------------------- controls

CONTROLS = {  # label: what is typed, the field of Sampling, what it becomes
    "Temperature": (0.5, "temperature", 0.5),
    "Top_p": (1, "top_p", 1),
    "Top_k": (7, "top_k", 7),
    "Min_p": (0.25, "min_p", 0.25),
    "Repetition_penalty": (1.5, "repetition_penalty", 1.5),
    "Beams": (3, "num_beams", 3),
    "Max_new_tokens": (33, "max_new_tokens", 33),
    "Seed": (" 1234567890 ", "seed", 1234567890),
    "Stop_texts": ("###\n\\n\n", "stop", ("###", "\n")),
}


def test_every_control_reaches_the_model(scripted: Scripted) -> None:
    page = Page(scripted)
    before = {name: getattr(page.config, name) for name in SAMPLING} | {"stop": ()}
    for label, (typed, field, value) in CONTROLS.items():
        scripted.requests.clear()
        for tab in TABS:
            list(page.ask(tab, **{label: typed}))
        assert len(scripted.requests) == 4  # two of them side by side
        for request in scripted.requests:
            found = {name: getattr(request.sampling, name) for name in before}
            assert found == before | {field: value} != before, label


SAMPLING = [field for _, field, _ in CONTROLS.values() if field != "stop"]


def test_controls_start_at_the_config(scripted: Scripted) -> None:
    options = {name: value for _, name, value in CONTROLS.values() if name != "stop"}
    page = Page(scripted, **options, stop=["###", "\n"], system="")
    list(page.ask())
    (request,) = scripted.requests
    assert {name: getattr(request.sampling, name) for name in options} == options
    assert request.sampling.stop == ("###", "\n")


REFUSED = [
    *(({label: None}, f"{label.replace('_', ' ')} is empty; a number is needed") for label in list(CONTROLS)[:7]),
    ({"Temperature": 11}, "temperature 11: a number from 0 to 10 is needed"),
    ({"Top_p": 0}, "top_p 0: a number above 0 to 1 is needed"),
    ({"Top_k": 40.5}, "top_k 40.5: a number from 0 is needed"),
    ({"Min_p": -1}, "min_p -1: a number from 0 to 1"),
    ({"Repetition_penalty": 0}, "repetition_penalty 0: a number above 0 to 10"),
    ({"Beams": 17}, "num_beams 17: a number from 1 to 16"),
    ({"Max_new_tokens": 0}, "max_new_tokens 0: a whole number from 1"),
    ({"Max_new_tokens": "9"}, "max_new_tokens '9': a whole number from 1"),
    ({"Seed": "-1"}, "Seed '-1': a whole number is needed, or nothing for a random one"),
    ({"Seed": "1e3"}, "Seed '1e3'"),
    ({"Stop_texts": "\n".join("abcdefghijklmnopq")}, "up to 16 texts"),
]


def test_what_cannot_be_is_a_message(scripted: Scripted) -> None:
    page = Page(scripted)
    for changes, message in REFUSED:
        for tab in TABS:
            with pytest.raises(gr.Error) as raised:
                list(page.ask(tab, **changes))
            assert message in html.unescape(raised.value.message)
            assert not raised.value.print_exception
    assert scripted.requests == []


def test_more_than_the_context_says_by_how_much(scripted: Scripted) -> None:
    with pytest.raises(gr.Error, match=r"together \d+ more than the 512 that this model takes; lower"):
        list(Page(scripted).ask(Max_new_tokens=512))


def test_an_empty_seed_is_random(scripted: Scripted) -> None:
    list(Page(scripted, seed=7).ask(Seed=""))
    assert scripted.requests[0].sampling.seed is None


def test_the_adapter_that_is_chosen_answers(scripted: Scripted) -> None:
    for tab in TABS[:2]:
        list(Page(scripted).ask(tab, Answers_by="base"))
    assert [request.adapter for request in scripted.requests] == ["base", "base"]


def test_what_a_template_takes_is_said_of_the_adapter_that_is_chosen(scripted: Scripted) -> None:
    codecs = {name: generator_of(scripted, template).codecs["base"] for name, template in TEMPLATES.items()}
    generator = Generator(codecs, scripted, Sampling(), 512, base_name="demo")
    blocks = build(generator, GenerateConfig(lora_weights="nowhere"))
    (chosen,) = [event.fn.__self__ for event in blocks.fns.values() if event.fn.__name__ == "_choose_adapter"]
    shown = {name: [box.visible for box in chosen._choose_adapter(name)] for name in TEMPLATES}
    assert shown == {
        "one": [False, True],
        "many": [True, False],
    }  # the box, and why there is none


TEMPLATES = {"one": "alpaca", "many": "vicuna"}


def test_any_two_of_several_adapters_can_be_compared(scripted: Scripted) -> None:
    page = Page(scripted, names=("one", "two", "base"))
    tab = page.tab("CompareTab")
    assert (tab.left.value, tab.right.value) == ("base", "one")
    list(tab.answer("Say it.", "", "one", "two", gr.Request(session_hash="one"), *page.values()))
    assert [request.adapter for request in scripted.requests] == ["one", "two"]


def test_there_is_no_choice_of_one(scripted: Scripted) -> None:
    page = Page(scripted, names=("base",))
    assert not page.settings.adapter.visible
    assert not any(
        type(getattr(event.fn, "__self__", None)).__name__ == "CompareTab" for event in page.blocks.fns.values()
    )
    assert Page(scripted).settings.adapter.visible


def test_a_system_message_is_taken_where_the_template_has_one(scripted: Scripted) -> None:
    without, with_one = Page(scripted), Page(scripted, "vicuna", system="Be brief.")
    assert (without.settings.system.visible, with_one.settings.system.visible) == (False, True)
    assert without.settings.no_system.value == "The template alpaca has no system message."
    for tab in TABS:
        list(with_one.ask(tab))
        list(with_one.ask(tab, System_message="Be loud."))
    list(without.ask(System_message="Be left."))
    assert "Be left." not in scripted.prompts().pop()
    scripted.requests.pop()
    assert ["Be brief." in text for text in scripted.prompts()] == [True, False, True, False, True, True, False, False]


# -------------------------------------------------------------------------------------------------------- examples


def run_folder(folder: Path, data_path: str, **options: Any) -> GenerateConfig:
    """Write the record of a run into a folder, and return the config that names it."""
    folder.mkdir()
    config = FinetuneConfig(data_path=data_path, output_dir=str(folder), **options)
    record = {
        "kind": "adapter", "status": "finished", "run": "1", "base_model": "demo", "options": config.model_dump(),
        "data_sha256": Rows(data_path).digest,
    }  # fmt: skip
    (folder / "lora_alpaca.json").write_text(json.dumps(privacy.published(record)))
    (folder / privacy.FILE).write_text(json.dumps(privacy.private(record)))
    return GenerateConfig(lora_weights=str(folder))


def test_examples_are_validation_rows_of_the_run(tmp_path: Path) -> None:
    config = run_folder(tmp_path / "adapter", "demo")
    found = Examples(config, is_private=False).read()
    rows = list(Rows("demo"))
    held = held_out(len(rows), None, 42)
    validation = [(row.question.text, row.question.input, row.answers[0]) for n, row in enumerate(rows) if n in held]
    assert found == validation[: len(found)] and len(found) == 6
    page = build(generator_of(Scripted(demo_tokenizer())), config)
    assert page is not None


def test_an_expected_answer_belongs_to_its_question(tmp_path: Path) -> None:
    examples = Examples(run_folder(tmp_path / "adapter", "demo"), is_private=True)
    first = examples.read()[0]
    assert examples.expected(first.instruction, first.input) == first.expected
    assert examples.expected(first.instruction, first.input + " ") is None


def test_rows_of_a_file_are_shown_on_a_private_page_only(tmp_path: Path, data_path: Path) -> None:
    config = run_folder(tmp_path / "adapter", str(data_path), val_set_size=5)
    assert len(Examples(config, is_private=True).read()) == 5
    assert Examples(config, is_private=False).read() == []


@pytest.mark.parametrize("damage", ["gone", "changed", "no record", "odd record"])
def test_a_page_without_examples_is_still_a_page(tmp_path: Path, data_path: Path, damage: str) -> None:
    config = run_folder(tmp_path / "adapter", str(data_path), val_set_size=5)
    record = tmp_path / "adapter" / "lora_alpaca.json"
    if damage == "gone":
        data_path.unlink()
    elif damage == "changed":
        data_path.write_text(data_path.read_text().replace("owl", "cat"))
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text('{"kind": "adapter", "status": 1, "options": {"data_path": []}}')
    assert Examples(config, is_private=True).read() == []


# -------------------------------------------------------------------------------------------------------- the page


def test_the_page_has_no_files_no_markdown_and_no_public_function(scripted: Scripted) -> None:
    page = Page(scripted).blocks
    kinds = {type(block).__name__ for block in page.blocks.values()}
    assert kinds <= {
        "Accordion", "Button", "Checkbox", "Column", "Dataset", "Dropdown", "Form", "HTML", "Number", "Row", "State",
        "Tab", "Tabs", "Textbox",
    }  # fmt: skip
    assert {event.api_visibility for event in page.fns.values()} == {"private"}
    assert page.get_api_info() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_every_question_is_asked_beside_as_many_as_the_config_says(scripted: Scripted) -> None:
    page = Page(scripted, max_batch=5).blocks
    asking_ones = [event for event in page.fns.values() if event.queue]
    assert len(asking_ones) == 6  # send, example, retry, edit; submit; compare
    assert {(event.concurrency_limit, event.concurrency_id) for event in asking_ones} == {(5, "answers")}


def test_names_are_shown_as_text(scripted: Scripted) -> None:
    page = Page(scripted, names=("<i>mine\x1b</i>", "base"))
    (head,) = [block.value for block in page.blocks.blocks.values() if getattr(block, "elem_id", "") == "title"]
    assert "demo + &lt;i&gt;mine\\x1b&lt;/i&gt;" in head
    assert ("<i>mine\\x1b</i>", "<i>mine\x1b</i>") in page.settings.adapter.choices


def test_of_a_folder_only_its_name_is_shown(scripted: Scripted, tmp_path: Path) -> None:
    generator = generator_of(scripted)
    generator.base_name = str(tmp_path)
    assert described(generator) == f"{tmp_path.name} + tuned"
    assert described(generator_of(scripted, names=("base",))) == "demo"


def test_control_characters_of_an_answer_are_shown(tokenizer: Any) -> None:
    for tab in TABS:
        scripted = Scripted(tokenizer, "a\x1b[2J\u202eb")
        assert any(r"a\\x1b[2J\\u202eb" in json.dumps(picture[0]) for picture in Page(scripted).ask(tab))


def test_analytics_are_off_and_fonts_are_the_systems(monkeypatch: pytest.MonkeyPatch, scripted: Scripted) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    importlib.reload(page_package)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert Page(scripted).blocks.analytics_enabled is False
    assert theme.THEME.font == "system-ui, sans-serif"
    assert theme.THEME.font_mono == "ui-monospace, monospace"
    assert "http" not in theme.CSS
