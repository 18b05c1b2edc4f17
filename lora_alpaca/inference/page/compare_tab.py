"""The tab with answers side by side: what finetuning changed."""

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from lora_alpaca.errors import visible
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.page import views
from lora_alpaca.inference.page.asking import Reading, Running, buttons, messages
from lora_alpaca.inference.page.differences import marked
from lora_alpaca.inference.page.examples import Examples
from lora_alpaca.inference.page.question import Question
from lora_alpaca.inference.page.settings import Settings
from lora_alpaca.inference.sampling import BASE


class CompareTab:
    """Two answers to one question, streamed together."""

    def __init__(self, generator: Generator, settings: Settings, examples: Examples):
        self.generator, self.settings, self.examples = generator, settings, examples
        self.question = Question(examples, "Tell me about alpacas.")
        self.running = Running()

    def build(self) -> None:
        """Put the tab on the page."""
        names = self.generator.names
        choices = [(visible(name), name) for name in names]
        with gr.Row():
            self.question.build()
        left = BASE if BASE in names else names[1]
        right = next(name for name in names if name != left)
        with gr.Row(visible=len(names) > 2):
            self.left = gr.Dropdown(choices, value=left, label="Left", filterable=False, min_width=140)
            self.right = gr.Dropdown(choices, value=right, label="Right", filterable=False, min_width=140)
        with gr.Row(elem_classes="buttons"):
            self.submit = gr.Button("Compare", variant="primary", min_width=120)
            self.stop = gr.Button("Stop", min_width=120, interactive=False)
        self.view = views.comparison()
        self.question.build_examples()

    def connect(self, page: gr.Blocks, options: dict[str, Any]) -> None:
        """Say what happens when. `options` are those of events that ask the model."""
        self.question.connect(page)
        gr.on(
            [self.submit.click, self.question.instruction.submit, self.question.input.submit],
            self.answer,
            [*self.question.boxes, self.left, self.right, *self.settings.inputs],
            [self.view, self.submit, self.stop],
            **options,
        )
        self.stop.click(self.running.stop, queue=False, api_visibility="private", show_progress="hidden")

    def answer(
        self, instruction: str, input: str, left: str, right: str, request: gr.Request, *values: Any
    ) -> Iterator[Any]:
        """Yield what the view and the two buttons become."""
        with messages():
            asked = self.settings.read(*values)
            conversation = asked.conversation(self.question.message(instruction, input))
            names = (left, right)
            answers = [self.generator.answer(conversation, adapter=name, **asked.sampling) for name in names]
            expected = visible(self.examples.expected(instruction, input) or "")
            for readings in self.running.follow(request.session_hash, answers):
                running = not all(reading.ended for reading in readings)
                yield _shown(names, readings, expected, asked.is_shown_whole), *buttons(running)


def _shown(names: Sequence[str], readings: Sequence[Reading], expected: str, whole: bool) -> dict[str, Any]:
    """Return the value of the view; differences are marked when both answers have ended."""
    texts = [visible(reading.text) if reading.ended or not whole else "" for reading in readings]
    over = all(reading.ended for reading in readings)
    parts = marked(*texts) if over else [[(text, False)] for text in texts]
    different = "Underlined: words that the other answer lacks."
    summary = "" if not over else different if texts[0] != texts[1] else "Both answers are the same."
    sides = [
        {"name": visible(name), "parts": part, "note": reading.note, "running": not reading.ended}
        for name, part, reading in zip(names, parts, readings, strict=True)
    ]
    return {"sides": sides, "expected": expected, "summary": summary}
