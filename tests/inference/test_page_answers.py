"""The web page without a browser: answers in a chat, in a form and side by side, as they stream, stop and fail."""

import html
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

gr = pytest.importorskip("gradio")

import scripted_page  # noqa: E402
from scripted_page import TABS, Page, Scripted, demo_tokenizer, ids_of  # noqa: E402

from lora_alpaca.errors import ConfigError  # noqa: E402
from lora_alpaca.inference.page import asking  # noqa: E402
from lora_alpaca.inference.page.differences import marked  # noqa: E402
from lora_alpaca.inference.sampling import Token  # noqa: E402


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
