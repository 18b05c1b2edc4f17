"""An instruction with its input, and examples to choose one from."""

from typing import Any

import gradio as gr

from lora_alpaca.errors import visible
from lora_alpaca.inference.page.examples import Examples
from lora_alpaca.prompts import Message


class Question:
    """The boxes of upstream's form, of one tab."""

    def __init__(self, examples: Examples, first: str = ""):
        self.examples, self.first = examples, first

    def build(self) -> None:
        """Put the boxes on the page."""
        self.instruction = gr.Textbox(self.first, label="Instruction", lines=3, max_lines=12, min_width=260)
        self.input = gr.Textbox(label="Input", placeholder="none", lines=3, max_lines=12, min_width=260)

    def build_examples(self) -> None:
        """Put the place of the examples on the page; nothing is seen there until they are read."""
        self.chooser = gr.Dataset(
            label="Examples from the validation rows",
            components=[gr.Textbox(render=False), gr.Textbox(render=False)],
            headers=["Instruction", "Input"],
            samples=[],
            type="index",
            visible=False,
            elem_classes="chooser",
        )

    @property
    def boxes(self) -> list[Any]:
        """Return the components that a question is read from."""
        return [self.instruction, self.input]

    def connect(self, page: gr.Blocks) -> None:
        """Fill the boxes with the example that is chosen."""
        quiet: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        self.chooser.click(self._choose, self.chooser, self.boxes, **quiet)
        page.load(self._read, None, self.chooser, **quiet)

    @staticmethod
    def message(instruction: str, input: str) -> Message:
        """Return a question as a message."""
        return Message("user", instruction, input)

    def _choose(self, number: int) -> list[str]:
        example = self.examples.read()[number]
        return [example.instruction, example.input]

    def _read(self) -> gr.Dataset:
        found = self.examples.read()
        return gr.Dataset(samples=[[visible(text) for text in example[:2]] for example in found], visible=bool(found))
