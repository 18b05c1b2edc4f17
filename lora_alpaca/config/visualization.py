"""The options of showing rows."""

from typing import ClassVar

from lora_alpaca.config.options import Names, option
from lora_alpaca.config.shared import BaseModelOptions, DataOptions


class ShowConfig(DataOptions, BaseModelOptions):
    """Show rows as the tokens that training sees: which are learned, which are not, and what was lost."""

    wording: ClassVar[dict[str, dict[str, str]]] = {
        "base_model": {"help": "Model whose tokenizer is used: a folder, a hub id, or `demo`.", "auto": "demo"},
        "revision": {"help": "Branch, tag or commit of a model from the hub.", "auto": "main"},
        "trust_remote_code": {"help": "Run Python code that the model's repository brings."},
    }

    row: Names = option(["1"], "what to show", "Which rows: their numbers in the order of the data, from 1.")
    html: str | None = option(
        None,
        "what to show",
        "Write a web page of the rows to this file; without --row, of the first 100.",
        auto="the terminal",
    )
