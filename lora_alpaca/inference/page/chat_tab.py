"""The tab with a conversation: send, stop, retry, edit, undo, clear."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lora_alpaca.errors import visible
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.page import views
from lora_alpaca.inference.page.asking import Running, busy, messages
from lora_alpaca.inference.page.examples import Examples
from lora_alpaca.inference.page.settings import Asked, Settings
from lora_alpaca.prompts import Conversation, Message


@dataclass
class Turn:
    """A question and its answer, with a line on how that is getting on."""

    question: str
    answer: str = ""
    note: str = ""
    running: bool = False


class ChatTab:
    """A conversation of each visitor, which is kept here and not taken from the browser."""

    def __init__(self, generator: Generator, settings: Settings, examples: Examples):
        self.generator, self.settings, self.examples = generator, settings, examples
        self.running = Running()

    def build(self) -> None:
        """Put the tab on the page."""
        self.view = views.conversation()
        self.turns = gr.State([])
        self.box = gr.Textbox(
            show_label=False,
            label="Message",
            placeholder="Write a message",
            lines=1,
            max_lines=10,
            submit_btn=True,
            elem_id="message",
        )
        with gr.Row(elem_classes="under"):
            self.one_turn = views.line(self._one_turn(self.generator.default))
            self.clear = gr.Button("Clear", size="sm", min_width=72, scale=0)

    def connect(self, page: gr.Blocks, options: dict[str, Any]) -> None:
        """Say what happens when. `options` are those of events that ask the model."""
        shown = [self.view, self.turns, self.box]
        asking: dict[str, Any] = options | {"outputs": shown}
        at_once: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        self.box.submit(self.send, [self.box, self.turns, *self.settings.inputs], **asking)
        self.view.example_select(self.send_example, [self.turns, *self.settings.inputs], **asking)
        self.view.retry(self.retry, [self.turns, *self.settings.inputs], **asking)
        self.view.edit(self.edit, [self.turns, *self.settings.inputs], **asking)
        self.view.undo(self.undo, [self.turns], shown, **at_once)
        self.clear.click(self.clear_all, [self.turns], shown, **at_once)
        self.box.stop(self.running.stop, None, None, **at_once)
        self.settings.adapter.change(
            lambda name: views.as_html(self._one_turn(name)), self.settings.adapter, self.one_turn, **at_once
        )
        page.load(lambda turns: self._shown(turns), self.turns, self.view, **at_once)

    # ------------------------------------------------------------------------------------------------ what happens

    def send(self, text: str, turns: list[Turn], request: gr.Request, *values: Any) -> Iterator[Any]:
        """Answer what is in the box, and empty that."""
        if text.strip():
            yield from self._answer(turns, text, request, values, value="")

    def send_example(self, turns: list[Turn], request: gr.Request, event: gr.EventData, *values: Any) -> Iterator[Any]:
        """Answer an example."""
        yield from self._answer(turns, str(event._data["text"]), request, values)

    def retry(self, turns: list[Turn], request: gr.Request, *values: Any) -> Iterator[Any]:
        """Answer the last question again."""
        if turns:
            yield from self._answer(turns[:-1], turns[-1].question, request, values)

    def edit(self, turns: list[Turn], request: gr.Request, event: gr.EventData, *values: Any) -> Iterator[Any]:
        """Answer a question that was changed, and leave what came after it."""
        number, text = event._data["index"], event._data["text"]
        if isinstance(number, int) and 0 <= number < len(turns) and isinstance(text, str) and text.strip():
            yield from self._answer(turns[:number], text, request, values)

    def undo(self, turns: list[Turn]) -> list[Any]:
        """Take the last question back into the box."""
        if not turns or turns[-1].running:
            return [gr.skip()] * 3
        return [self._shown(turns[:-1]), turns[:-1], turns[-1].question]

    def clear_all(self, turns: list[Turn]) -> list[Any]:
        """Begin anew. Raises gr.Error while an answer is being written."""
        if turns and turns[-1].running:
            raise busy()
        return [self._shown([]), [], gr.skip()]

    def _answer(
        self, before: list[Turn], question: str, request: gr.Request, values: Sequence[Any], **box: Any
    ) -> Iterator[Any]:
        """Yield what the view, the turns and the box become, while a question is answered."""
        with messages():
            asked = self.settings.read(*values)
            answer = self.generator.answer(
                self._conversation(before, question, asked), adapter=asked.adapter, **asked.sampling
            )
            turn = Turn(question, running=True)
            turns = [*before, turn]
            box_now = gr.Textbox(submit_btn=False, stop_btn=True, **box)
            try:
                for (reading,) in self.running.follow(request.session_hash, [answer]):
                    turn.note, turn.running = reading.note, not reading.ended
                    if reading.ended or not asked.is_shown_whole:
                        turn.answer = reading.text
                    if reading.ended:
                        box_now = gr.Textbox(submit_btn=True, stop_btn=False, **box)
                    yield self._shown(turns), turns, box_now
                    box, box_now = {}, gr.skip()
            finally:
                turn.running = False

    def _conversation(self, before: Sequence[Turn], question: str, asked: Asked) -> Conversation:
        """Return what the model is asked: the question, after the turns before it where the template takes them."""
        takes_turns = self.settings.codecs[asked.adapter].takes_turns
        earlier = [turn for turn in before if turn.answer] if takes_turns else []
        pairs = [(Message("user", turn.question), Message("assistant", turn.answer)) for turn in earlier]
        return asked.conversation(*(message for pair in pairs for message in pair), Message("user", question))

    # ----------------------------------------------------------------------------------------------- what is shown

    def _shown(self, turns: Sequence[Turn]) -> dict[str, Any]:
        """Return the value of the view."""
        pictures = [
            {"question": turn.question, "answer": visible(turn.answer), "note": turn.note, "running": turn.running}
            for turn in turns
        ]
        single = [] if turns else [example.instruction for example in self.examples.read() if not example.input]
        return {"turns": pictures, "examples": single[:4], "hello": "What would you like to ask?"}

    def _one_turn(self, name: str) -> str:
        """Return a line on a template that takes one turn only."""
        codec = self.settings.codecs[name]
        template = codec.template.name
        return "" if codec.takes_turns else f"The template {template} takes one turn: each message is answered alone."
