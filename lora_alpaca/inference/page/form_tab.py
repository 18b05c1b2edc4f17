"""The tab with upstream's form: an instruction, its input, and the answer."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from lora_alpaca.errors import visible
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.page import views
from lora_alpaca.inference.page.asking import Running, buttons, messages
from lora_alpaca.inference.page.examples import Examples
from lora_alpaca.inference.page.question import Question
from lora_alpaca.inference.page.settings import Settings


class FormTab:
    """One question and its answer."""

    def __init__(self, generator: Generator, settings: Settings, examples: Examples):
        self.generator, self.settings, self.examples = generator, settings, examples
        self.question = Question(examples, "Tell me about alpacas.")
        self.running = Running()

    def build(self) -> None:
        """Put the tab on the page."""
        with gr.Row():
            with gr.Column(min_width=300):
                self.question.build()
                with gr.Row(elem_classes="buttons"):
                    self.submit = gr.Button("Submit", variant="primary", min_width=120)
                    self.stop = gr.Button("Stop", min_width=120, interactive=False)
            with gr.Column(min_width=300):
                self.output = gr.Textbox(label="Output", lines=9, max_lines=24, interactive=False, buttons=["copy"])
                self.note = views.line("")
                self.expected = gr.Textbox(
                    label="Expected", lines=2, max_lines=12, interactive=False, visible=False, elem_id="expected"
                )
        self.question.build_examples()

    def connect(self, page: gr.Blocks, options: dict[str, Any]) -> None:
        """Say what happens when. `options` are those of events that ask the model."""
        self.question.connect(page)
        gr.on(
            [self.submit.click, self.question.instruction.submit, self.question.input.submit],  # shift and enter
            self.answer,
            [*self.question.boxes, *self.settings.inputs],
            [self.output, self.note, self.expected, self.submit, self.stop],
            **options,
        )
        self.stop.click(self.running.stop, queue=False, api_visibility="private", show_progress="hidden")

    def answer(self, instruction: str, input: str, request: gr.Request, *values: Any) -> Iterator[Any]:
        """Yield what the output, its line, the expected answer and the two buttons become."""
        with messages():
            asked = self.settings.read(*values)
            message = self.question.message(instruction, input)
            answer = self.generator.answer(asked.conversation(message), adapter=asked.adapter, **asked.sampling)
            expected = self.examples.expected(instruction, input)
            shown = gr.Textbox(visible(expected or ""), visible=expected is not None)
            text = ""
            for (reading,) in self.running.follow(request.session_hash, [answer]):
                if reading.ended or not asked.is_shown_whole:
                    text = visible(reading.text)
                yield text, views.as_html(reading.note), shown, *buttons(running=not reading.ended)
                shown = gr.skip()
