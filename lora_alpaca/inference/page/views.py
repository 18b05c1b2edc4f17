"""The parts of the page that show text: a conversation, answers side by side, and lines of small print.

Gradio's own chat shows its text as HTML, even with Markdown switched off, so these are drawn by scripts of ours.
"""

import html
from pathlib import Path

import gradio as gr

from lora_alpaca.errors import visible

_ASSETS = Path(__file__).parent / "assets"


def asset(name: str) -> str:
    """Return the text of a script or a style sheet of the page."""
    return (_ASSETS / name).read_text(encoding="utf-8")


def conversation() -> gr.HTML:
    """Return the view of a conversation. Its events are `edit`, `retry`, `undo` and `example_select`."""
    template = '<div class="log" role="log" aria-live="polite" aria-label="Conversation" tabindex="0"></div>'
    return _view("conversation", template)


def comparison() -> gr.HTML:
    """Return the view of answers side by side."""
    return _view("comparison", '<p class="summary" aria-live="polite"></p><div class="sides"></div>')


def line(text: str, name: str = "note", shown: bool = True, elem_id: str | None = None) -> gr.HTML:
    """Return a line of text. Its value is what `as_html` makes of a text."""
    return gr.HTML(as_html(text), elem_classes=name, visible=shown, js_on_load=None, elem_id=elem_id)


def as_html(text: str) -> str:
    """Return HTML that shows a text as it is, its control characters written out."""
    return html.escape(visible(text))


def _view(name: str, template: str) -> gr.HTML:
    script = asset("text.js") + asset(f"{name}.js")
    return gr.HTML(html_template=template, js_on_load=script, apply_default_css=False, elem_id=name)
