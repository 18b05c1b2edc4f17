"""The web page without a browser: what its controls hand on, what it shows, and how it is served."""

import asyncio
import html
import importlib
import itertools
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

gr = pytest.importorskip("gradio")

from lora_alpaca.artifacts import privacy  # noqa: E402
from lora_alpaca.config import FinetuneConfig, GenerateConfig  # noqa: E402
from lora_alpaca.data import Rows, held_out  # noqa: E402
from lora_alpaca.errors import ConfigError  # noqa: E402
from lora_alpaca.inference import page as page_package  # noqa: E402
from lora_alpaca.inference.addresses import listen  # noqa: E402
from lora_alpaca.inference.codec import Codec  # noqa: E402
from lora_alpaca.inference.generator import Generator  # noqa: E402
from lora_alpaca.inference.page import asking, theme  # noqa: E402
from lora_alpaca.inference.page import launch as launching  # noqa: E402
from lora_alpaca.inference.page.differences import marked  # noqa: E402
from lora_alpaca.inference.page.examples import Examples  # noqa: E402
from lora_alpaca.inference.page.layout import build, described  # noqa: E402
from lora_alpaca.inference.sampling import Request, Sampling, Token  # noqa: E402
from lora_alpaca.inference.token_generator import Channel, TokenStream  # noqa: E402
from lora_alpaca.models.base import demo_base  # noqa: E402
from lora_alpaca.prompts import load_template  # noqa: E402


@pytest.fixture(autouse=True)
def closed_loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the event loops that gradio makes for every page and leaves open."""
    made: list[asyncio.AbstractEventLoop] = []
    make = asyncio.new_event_loop

    def remember() -> asyncio.AbstractEventLoop:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", remember)
    yield
    asyncio.set_event_loop(None)
    for loop in made:
        loop.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(demo_base())


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class Scripted:
    """A token generator whose every answer is a text, token by token, then an error if there is one.

    With `hold`, answers do not end until their readers leave.
    """

    def __init__(self, tokenizer: Any, text: str = "Alpacas hum.", error: Exception | None = None, hold: bool = False):
        self.tokenizer, self.text, self.error, self.hold = tokenizer, text, error, hold
        self.requests: list[Request] = []
        self.channels: list[Channel] = []

    def generate(self, request: Request) -> TokenStream:
        self.requests.append(request)
        channel = Channel()
        self.channels.append(channel)
        numbers = ids_of(self.tokenizer, self.text)[: request.sampling.max_new_tokens]
        for number in numbers:
            channel.put([Token(number)])
        if self.error is not None:
            channel.end(self.error)
        elif not self.hold:
            if len(numbers) < (request.sampling.max_new_tokens or 0):
                channel.put([Token(next(iter(request.stop_ids)))])
            channel.end()
        return TokenStream(channel)

    def close(self) -> None:
        pass

    @property
    def open(self) -> int:
        """Return how many answers somebody still waits for."""
        return sum(not channel.left.is_set() for channel in self.channels)

    def prompts(self) -> list[str]:
        """Return what was asked, as text."""
        return [self.tokenizer.decode(list(request.prompt_ids)) for request in self.requests]


@pytest.fixture
def scripted(tokenizer: Any) -> Scripted:
    return Scripted(tokenizer)


def generator_of(scripted: Scripted, template: str = "alpaca", names: tuple[str, ...] = ("tuned", "base")) -> Generator:
    """Return a generator with the demo's tokenizer, a context of 512 tokens, and scripted answers."""
    codec = Codec(scripted.tokenizer, load_template(template), None, len(scripted.tokenizer))
    return Generator(dict.fromkeys(names, codec), scripted, Sampling(), 512, base_name="demo")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pictures follow each other without a pause, and no adapter be found in the folder of the tests."""
    monkeypatch.setattr(asking, "PICTURE", 0)
    monkeypatch.setattr(asking, "HEARTBEAT", 0.02)


class Page:
    """The functions behind a page, called as gradio calls them."""

    def __init__(self, scripted: Scripted, template: str = "alpaca", names: Any = ("tuned", "base"), **options: Any):
        self.scripted = scripted
        self.config = GenerateConfig(**{"lora_weights": "nowhere"} | options)
        self.generator = generator_of(scripted, template, names)
        self.blocks = build(self.generator, self.config)

    def tab(self, name: str) -> Any:
        """Return a tab: ChatTab, FormTab or CompareTab."""
        owners = (getattr(event.fn, "__self__", None) for event in self.blocks.fns.values())
        return next(owner for owner in owners if type(owner).__name__ == name)

    @property
    def settings(self) -> Any:
        return self.tab("ChatTab").settings

    def values(self, **changes: Any) -> list[Any]:
        """Return the values of the controls, of which some were changed by their labels."""
        found = {block.label: block.value for block in self.settings.inputs}
        assert set(changes) <= {label.replace(" ", "_") for label in found}
        return [changes.get(label.replace(" ", "_"), value) for label, value in found.items()]

    def ask(self, tab: str = "ChatTab", session: str = "one", **changes: Any) -> Iterator[Any]:
        """Return the pictures of an answer to "Say it." in a tab."""
        request, values = gr.Request(session_hash=session), self.values(**changes)
        if tab == "ChatTab":
            return self.tab(tab).send("Say it.", [], request, *values)
        sides = ["base", "tuned"] if tab == "CompareTab" else []
        return self.tab(tab).answer("Say it.", "", *sides, request, *values)

    def chat(self, turns: list[Any], *asked: Any, do: str = "send", **changes: Any) -> tuple[dict[str, Any], list[Any]]:
        """Return what the view and the turns are after one of the chat's actions."""
        request = gr.Request(session_hash="one")
        arguments = {"send": [*asked, turns, request], "retry": [turns, request], "edit": [turns, request, *asked]}[do]
        *_, (view, after, _) = getattr(self.tab("ChatTab"), do)(*arguments, *self.values(**changes))
        return view, after


TABS = ("ChatTab", "FormTab", "CompareTab")


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


# ------------------------------------------------------------------------------------------------------------ chat


def test_an_answer_streams_and_says_how_it_ended(scripted: Scripted) -> None:
    views = [view for view, _, _ in Page(scripted).ask() if isinstance(view, dict) and "turns" in view]
    (turn,) = views[-1]["turns"]
    assert (turn["question"], turn["answer"], turn["running"]) == ("Say it.", "Alpacas hum.", False)
    tokens = len(ids_of(scripted.tokenizer, "Alpacas hum.")) + 1
    assert turn["note"] == f"ended by itself · {tokens} tokens"


@pytest.mark.parametrize(
    ("changes", "answer", "note"),
    [
        ({"Max_new_tokens": 1}, "Al", "cut off at max new tokens · 1 token"),
        ({"Stop_texts": " hum"}, "Alpacas", "ended at the stop text ' hum' · "),
    ],
)
def test_a_line_says_what_ended_the_answer(scripted: Scripted, changes: Any, answer: str, note: str) -> None:
    view, _ = Page(scripted).chat([], "Say it.", **changes)
    assert view["turns"][0]["answer"].startswith(answer)
    assert view["turns"][0]["note"].startswith(note)


def test_speed_is_that_between_the_tokens(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    scripted = Scripted(tokenizer, "", hold=True)
    times = itertools.count(100.0, 0.5)
    monkeypatch.setattr(asking.time, "monotonic", lambda: next(times))
    pictures = Page(scripted).ask()
    next(pictures)
    for number in ids_of(tokenizer, "one two three four")[:4]:
        scripted.channels[0].put([Token(number)])
    assert next(pictures)[0]["turns"][0]["note"] == "writing … 4 tokens · 2.0 tokens/s"
    pictures.close()


def test_the_turns_before_are_handed_on_where_the_template_takes_them(scripted: Scripted) -> None:
    page = Page(scripted, "vicuna")
    _, turns = page.chat([], "First?")
    view, turns = page.chat(turns, "Second?")
    assert [turn["question"] for turn in view["turns"]] == ["First?", "Second?"]
    assert "First?" in scripted.prompts()[1] and "Alpacas hum." in scripted.prompts()[1]
    assert page.tab("ChatTab").one_turn.value == ""


def test_a_template_of_one_turn_says_so_and_is_asked_single_turns(scripted: Scripted) -> None:
    page = Page(scripted)
    _, turns = page.chat([], "First?")
    page.chat(turns, "Second?")
    assert "First?" not in scripted.prompts()[1]
    assert page.tab("ChatTab").one_turn.value == "The template alpaca takes one turn: each message is answered alone."


def test_retry_answers_the_last_question_again(scripted: Scripted) -> None:
    page = Page(scripted, "vicuna")
    _, turns = page.chat([], "First?")
    _, turns = page.chat(turns, "Second?")
    scripted.text = "Better."
    view, turns = page.chat(turns, do="retry")
    assert [turn["answer"] for turn in view["turns"]] == ["Alpacas hum.", "Better."]
    assert scripted.prompts()[2] == scripted.prompts()[1]


def test_edit_answers_a_changed_question_and_leaves_what_came_after(scripted: Scripted) -> None:
    page = Page(scripted, "vicuna")
    _, turns = page.chat([], "First?")
    _, turns = page.chat(turns, "Second?")
    view, turns = page.chat(turns, gr.EventData(None, {"index": 0, "text": "Other?"}), do="edit")
    assert [turn["question"] for turn in view["turns"]] == ["Other?"]
    assert "First?" not in scripted.prompts()[2]


@pytest.mark.parametrize("data", [{"index": 1, "text": "x"}, {"index": -1, "text": "x"}, {"index": "0", "text": "x"}])
def test_edit_of_what_is_not_there_does_nothing(scripted: Scripted, data: Any) -> None:
    page = Page(scripted)
    _, turns = page.chat([], "First?")
    request = gr.Request(session_hash="one")
    assert list(page.tab("ChatTab").edit(turns, request, gr.EventData(None, data), *page.values())) == []


def test_undo_puts_the_question_back_into_the_box(scripted: Scripted) -> None:
    page = Page(scripted)
    _, turns = page.chat([], "First?")
    view, kept, box = page.tab("ChatTab").undo(turns)
    assert (view["turns"], kept, box) == ([], [], "First?")
    assert page.tab("ChatTab").undo([]) == [gr.skip()] * 3


def test_clear_waits_for_an_answer(tokenizer: Any) -> None:
    scripted = Scripted(tokenizer, hold=True)
    page = Page(scripted)
    pictures = page.ask()
    _, turns, _ = next(pictures)
    with pytest.raises(gr.Error, match="still being written"):
        page.tab("ChatTab").clear_all(turns)
    assert page.tab("ChatTab").undo(turns) == [gr.skip()] * 3
    pictures.close()
    assert page.tab("ChatTab").clear_all(turns)[:2] == [page.tab("ChatTab")._shown([]), []]


def test_a_message_of_nothing_is_not_sent(scripted: Scripted) -> None:
    page = Page(scripted)
    assert list(page.tab("ChatTab").send(" \n", [], gr.Request(session_hash="one"), *page.values())) == []


@pytest.mark.parametrize("changes", [{"Stream_output": False}, {"Beams": 2}])
@pytest.mark.parametrize("tab", TABS)
def test_what_is_not_streamed_is_shown_whole(tokenizer: Any, tab: str, changes: Any) -> None:
    scripted = Scripted(tokenizer, hold=True)
    pictures = Page(scripted).ask(tab, **changes)
    shown = [json.dumps(next(pictures)[0]) for _ in range(3)]
    assert not any("Alpacas" in picture for picture in shown)
    for channel in scripted.channels:
        channel.end()
    assert any("Alpacas hum." in json.dumps(picture[0]) for picture in pictures)


@pytest.mark.parametrize("tab", TABS)
def test_stop_ends_the_answers_of_its_session_and_tab_only(tokenizer: Any, tab: str) -> None:
    scripted = Scripted(tokenizer, hold=True)
    page = Page(scripted)
    mine, other, elsewhere = page.ask(tab, "mine"), page.ask(tab, "other"), page.ask(TABS[tab == TABS[0]], "mine")
    for pictures in (mine, other, elsewhere):
        next(pictures)
    before = scripted.open
    page.tab(tab).running.stop(gr.Request(session_hash="mine"))
    last = list(mine)
    assert "stopped " in json.dumps([picture[:2] for picture in last], default=str)
    assert "Alpacas hum." in json.dumps([picture[:1] for picture in last], default=str)
    assert scripted.open == before - (2 if tab == "CompareTab" else 1)
    next(other), next(elsewhere)
    other.close(), elsewhere.close()
    assert scripted.open == 0


@pytest.mark.parametrize("tab", TABS)
def test_a_reader_who_leaves_stops_the_model(tokenizer: Any, tab: str) -> None:
    scripted = Scripted(tokenizer, hold=True)
    pictures = Page(scripted).ask(tab)
    next(pictures)
    assert scripted.open == len(scripted.channels)
    pictures.close()
    assert scripted.open == 0


def test_a_second_question_of_a_session_waits_for_the_first(tokenizer: Any) -> None:
    scripted = Scripted(tokenizer, hold=True)
    page = Page(scripted)
    first = page.ask()
    next(first)
    with pytest.raises(gr.Error, match="still being written"):
        list(page.ask())
    assert scripted.open == 1
    first.close()


@pytest.mark.parametrize("tab", TABS)
def test_an_error_of_ours_is_shown_as_text_and_the_next_answer_comes(tokenizer: Any, tab: str) -> None:
    scripted = Scripted(tokenizer, error=ConfigError("the prompt <b>does not</b> fit"))
    page = Page(scripted)
    with pytest.raises(gr.Error) as raised:
        list(page.ask(tab))
    assert raised.value.message == html.escape("the prompt <b>does not</b> fit")  # gradio shows messages as HTML
    assert not raised.value.print_exception
    scripted.error = None
    assert any("ended by itself" in json.dumps(picture, default=str) for picture in page.ask(tab))


@pytest.mark.parametrize("tab", TABS)
def test_after_an_error_of_the_model_the_page_can_be_asked_again(tokenizer: Any, tab: str) -> None:
    shown = []
    with pytest.raises(RuntimeError, match="out of memory"):
        for picture in Page(Scripted(tokenizer, error=RuntimeError("out of memory"))).ask(tab):
            shown.append(picture)
    last = shown[-1][-1]  # the box, or the button that stops
    assert last.submit_btn if tab == "ChatTab" else not last.interactive
    assert any("failed" in json.dumps(picture[:2], default=str) for picture in shown)


# ---------------------------------------------------------------------------------------------------- side by side


def test_both_are_asked_the_same_and_differences_are_marked(scripted: Scripted) -> None:
    page = Page(scripted)
    *_, last = page.ask("CompareTab")
    assert [request.adapter for request in scripted.requests] == ["base", "tuned"]
    assert scripted.requests[0].prompt_ids == scripted.requests[1].prompt_ids
    assert [side["name"] for side in last[0]["sides"]] == ["base", "tuned"]
    assert last[0]["summary"] == "Both answers are the same."


@pytest.mark.parametrize(
    ("left", "right", "parts"),
    [
        ("a b c", "a b c", ([("a b c", False)], [("a b c", False)])),
        ("", "a", ([], [("a", True)])),
        ("It is hot.", "It is very cold.", ("It is [hot].", "It is [very cold].")),
        ("one  two", "one two", ("one  two", "one two")),
        ("a\nb", "b", ("[a]\nb", "b")),
        ("x " * 4000, "y", ([("x " * 4000, False)], [("y", False)])),
    ],
)
def test_words_that_the_other_lacks_are_marked(left: str, right: str, parts: Any) -> None:
    found = marked(left, right)
    assert ("".join(text for text, _ in found[0]), "".join(text for text, _ in found[1])) == (left, right)
    if isinstance(parts[0], str):
        assert tuple("".join(f"[{text}]" if there else text for text, there in side) for side in found) == parts
    else:
        assert [[part for part in side if part[1]] for side in found] == [
            [part for part in side if part[1]] for side in parts
        ]


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
    page = build(generator_of(Scripted(transformers.AutoTokenizer.from_pretrained(demo_base()))), config)
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


# ---------------------------------------------------------------------------------------------------------- serving


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make `launch` return instead of serving; the dict gets what gradio was told."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: told.update(options, page=page))
    monkeypatch.setattr(gr.Blocks, "close", lambda page, **options: told.update(closed=True))
    monkeypatch.setattr(launching, "Event", lambda: SimpleNamespace(wait=lambda: None))
    monkeypatch.setenv("no_proxy", "intranet")
    return told


def launch(**options: Any) -> None:
    generator = generator_of(Scripted(transformers.AutoTokenizer.from_pretrained(demo_base())))
    launching.launch(generator, GenerateConfig(**options))


def test_launch_is_private_by_default(
    launched: dict[str, Any], free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(server_port=free_port)
    assert launched["server_name"] == "127.0.0.1"
    assert launched["server_port"] == free_port
    assert launched["share"] is False
    assert launched["allowed_paths"] == launched["footer_links"] == []
    assert launched["closed"]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"server_name": "0.0.0.0"}, {"share_gradio": True}])
def test_launch_honours_its_flags_and_warns_of_an_open_page(
    launched: dict[str, Any], free_port: int, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    launch(server_port=free_port, **options)
    assert launched["server_name"] == options.get("server_name", "127.0.0.1")
    assert launched["share"] is options.get("share_gradio", False)
    assert "warning: the page has no password" in capsys.readouterr().err


def test_own_page_is_not_asked_for_through_a_proxy(launched: dict[str, Any], free_port: int) -> None:
    launch(server_port=free_port)
    assert os.environ["no_proxy"] == "intranet,localhost,127.0.0.1"


def test_port_in_use_is_one_line_and_the_next_one_is_found(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        with pytest.raises(ConfigError, match=f"--server_port: {free_port} is in use; name another one"):
            launch(server_port=free_port)
        opened = listen("127.0.0.1", None, range(free_port, free_port + 20))
        opened.socket.close()
        assert opened.port > free_port
        monkeypatch.setattr(launching, "PORTS", range(free_port, free_port + 1))
        with pytest.raises(ConfigError, match=f"{free_port} to {free_port} are in use"):
            launch()


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("300.1.1.1", "no such host"),
        ("", "no such host"),
        ("a" * 100, "no such host"),
    ],
)
def test_invalid_host_is_one_line(host: str, message: str, free_port: int) -> None:
    with pytest.raises(ConfigError, match=message):
        launch(server_name=host, server_port=free_port)


def test_address_of_another_machine_is_one_line(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = "192.0.2.1"  # reserved for documentation, so nobody's
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (elsewhere, 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **more: [found])
    with pytest.raises(ConfigError, match=f"--server_name {elsewhere}: not an address of this machine"):
        launch(server_name=elsewhere, server_port=free_port)


def test_a_failure_of_the_server_is_one_line(
    launched: dict[str, Any], free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(page: Any, **options: Any) -> None:
        raise OSError("taken in the meantime")

    monkeypatch.setattr(gr.Blocks, "launch", fail)
    with pytest.raises(ConfigError, match=f"--server_port {free_port}: taken in the meantime"):
        launch(server_port=free_port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_page_is_served_and_closed(host: str, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real server, asked at the place where `launch` waits to be interrupted."""
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    got: dict[str, str] = {}
    url = f"http://{f'[{host}]' if ':' in host else host}:{free_port}/"

    def interrupted() -> None:
        for path in ("", "theme.css"):
            with urllib.request.urlopen(url + path) as response:
                got[path] = response.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="40"):
            urllib.request.urlopen(url + "monitoring/summary")
        raise KeyboardInterrupt

    monkeypatch.setattr(launching, "Event", lambda: SimpleNamespace(wait=interrupted))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(KeyboardInterrupt):
        launch(server_name=host, server_port=free_port)
    assert "LoRA Alpaca" in got[""]
    assert "fonts.googleapis" not in got[""] + got["theme.css"]
    assert "url(http" not in got["theme.css"].replace("'", "").replace('"', "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, free_port), 5).close()


# -------------------------------------------------------------------------------------------- what is refused to serve


@pytest.fixture
def asked(free_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return `asked(lines, server_name, share_url)`: what a real server answers to raw requests, one after another."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def ask(requests: list[str], server_name: str = "127.0.0.1", share_url: str = "") -> list[str]:
        answers: list[str] = []

        def interrupted() -> None:
            for request in requests:
                with socket.create_connection(("127.0.0.1", free_port), 10) as connection:
                    connection.sendall(request.replace("PORT", str(free_port)).encode())
                    answers.append(b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode("latin-1"))
            raise KeyboardInterrupt

        if share_url:
            launch_page = gr.Blocks.launch

            def launched(page: Any, **options: Any) -> None:
                launch_page(page, **options | {"share": False})
                page.share_url = share_url

            monkeypatch.setattr(gr.Blocks, "launch", launched)
        monkeypatch.setattr(launching, "Event", lambda: SimpleNamespace(wait=interrupted))
        with pytest.raises(KeyboardInterrupt):
            launch(server_name=server_name, server_port=free_port, share_gradio=bool(share_url))
        return answers

    return ask


def get(host: str, path: str = "/config", more: str = "") -> str:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n"


def status(answer: str) -> int:
    return int(answer.split(" ", 2)[1])


def test_the_page_answers_under_its_own_names_only(asked: Any) -> None:
    own = ["127.0.0.1:PORT", "localhost:PORT", "LOCALHOST", "[::1]:PORT", "localhost."]
    foreign = ["evil.example:PORT", "127.0.0.1.evil.example", "localhost.evil.example", "", "10.0.0.1:PORT", "a@b:x"]
    twice = "GET /config HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    none = "GET /config HTTP/1.0\r\n\r\n"
    answers = asked([*map(get, own), *map(get, foreign), twice, none])
    assert [status(answer) for answer in answers] == [200] * len(own) + [400] * (len(foreign) + 2)
    assert "--server_name says under which (now 127.0.0.1)" in answers[len(own)]


def test_the_browser_is_told_to_fetch_nothing_from_elsewhere(asked: Any) -> None:
    for answer in asked([get("localhost", path) for path in ("/", "/config", "/theme.css")]):
        head = answer.partition("\r\n\r\n")[0].lower()
        policy = head.partition("content-security-policy: ")[2].partition("\r\n")[0]
        assert policy.startswith("default-src 'self' ") and "http" not in policy and "*" not in policy
        assert "referrer-policy: no-referrer" in head and "x-content-type-options: nosniff" in head


def test_a_page_on_every_address_answers_under_numbers_and_the_machines_name(asked: Any) -> None:
    hosts = ["127.0.0.1:PORT", "10.1.2.3:PORT", socket.gethostname(), "evil.example:PORT"]
    assert [status(answer) for answer in asked([*map(get, hosts)], "0.0.0.0")] == [200, 200, 200, 400]


def test_a_shared_page_answers_under_its_link(asked: Any) -> None:
    hosts = ["abc.gradio.live", "xyz.gradio.live", "localhost:PORT"]
    assert [status(answer) for answer in asked([*map(get, hosts)], share_url="https://abc.gradio.live")] == [
        200,
        400,
        200,
    ]


def test_a_page_from_elsewhere_may_not_use_this_one(asked: Any) -> None:
    body = '{"data": [], "fn_index": 0, "session_hash": "x"}'
    post = "POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: "
    post += f"application/json\r\nContent-Length: {len(body)}\r\nOrigin: ORIGIN\r\n\r\n{body}"
    origins = ["https://evil.example", "null", "http://localhost:PORT"]
    answers = asked([post.replace("ORIGIN", origin) for origin in origins])
    assert [status(answer) for answer in answers[:2]] == [403, 403]
    assert status(answers[2]) not in (400, 403, 404, 405)


def test_the_page_takes_and_gives_no_files(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    form = '--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nx\r\n--b--\r\n'
    upload = (
        "POST PATH HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: multipart/form-data; boundary=b"
    )
    upload += f"\r\nContent-Length: {len(form)}\r\n\r\n{form}"
    paths = ["/gradio_api/upload", "/gradio_api/upload?upload_id=1", "/upload", "/gradio_api/component_server"]
    paths += ["/gradio_api/process_recording", "/gradio_api/stream/1", "/gradio_api/UPLOAD", "/gradio_api/%75pload"]
    reads = [f"/gradio_api/file={tmp_path}/secret.txt", f"/gradio_api/file/{tmp_path}/secret.txt", "/monitoring"]
    reads += ["/gradio_api/proxy=http://localhost/", "/gradio_api/upload_progress?upload_id=1", "/gradio_api/deep_link"]
    before = sorted(tmp_path.rglob("*"))
    answers = asked([*(upload.replace("PATH", path) for path in paths), *(get("localhost", path) for path in reads)])
    assert [status(answer) for answer in answers] == [405] * len(paths) + [404] * len(reads)
    assert not any("secret" in answer for answer in answers)
    assert sorted(tmp_path.rglob("*")) == before  # the folder for temporary files
