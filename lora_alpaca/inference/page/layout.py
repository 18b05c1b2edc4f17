"""The page: who answers, three tabs, the settings they share, and a line of small print."""

from pathlib import Path
from typing import Any

import gradio as gr

from lora_alpaca.config import GenerateConfig
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.page import views
from lora_alpaca.inference.page.chat_tab import ChatTab
from lora_alpaca.inference.page.compare_tab import CompareTab
from lora_alpaca.inference.page.examples import Examples
from lora_alpaca.inference.page.form_tab import FormTab
from lora_alpaca.inference.page.settings import Settings
from lora_alpaca.inference.sampling import BASE
from lora_alpaca.storage.paths import user_path

TITLE = "LoRA Alpaca"


def build(generator: Generator, config: GenerateConfig, is_private: bool = True) -> gr.Blocks:
    """Return the page, its controls at the values of the config. Theme and style sheet go to its `launch`."""
    examples = Examples(config, is_private)
    page = gr.Blocks(title=TITLE, analytics_enabled=False)
    with page:
        settings = Settings(generator, config)
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>{TITLE}</h1><p>{views.as_html(described(generator))}</p>", js_on_load=None, elem_id="title")
            views.line("Answers by", "note", shown=len(generator.names) > 1, elem_id="by")
            settings.adapter.render()
        tabs: dict[str, Any] = {
            "Chat": ChatTab(generator, settings, examples),
            "Instruction": FormTab(generator, settings, examples),
        }
        if len(generator.names) > 1:
            tabs["Compare"] = CompareTab(generator, settings, examples)
        with gr.Tabs():
            for name, tab in tabs.items():
                with gr.Tab(name, elem_id=name.lower()):
                    tab.build()
        settings.build()
        views.line("What it says may be wrong.", "small-print")
        asking = {
            "api_visibility": "private",
            "show_progress": "hidden",  # the tabs show it
            "trigger_mode": "once",  # a second click while an answer is written does nothing
            "concurrency_limit": config.max_batch,
            "concurrency_id": "answers",
        }
        for tab in tabs.values():
            tab.connect(page, asking)
    return page


def described(generator: Generator) -> str:
    """Return a line on what answers here. Of a folder only its name is shown, for the page may be public."""
    names = [generator.base_name, *(name for name in generator.names if name != BASE)]
    shown = [Path(name).resolve().name if user_path(name).exists() else name for name in names]
    return " + ".join(shown)
