"""The options of showing rows."""

from typing import ClassVar, Self

from pydantic import model_validator

from lora_alpaca.config.options import Names, option
from lora_alpaca.config.shared import ADAPTER_DIR, BaseModelOptions, DataOptions
from lora_alpaca.errors import ConfigError


class ShowConfig(DataOptions, BaseModelOptions):
    """Show rows as the tokens that training sees: which are learned, which are not, and what was lost."""

    wording: ClassVar[dict[str, dict[str, str]]] = {
        "base_model": {"help": "Model whose tokenizer is used: a folder, a hub id, or `demo`.", "auto": "demo"},
        "revision": {"help": "Branch, tag or commit of a model from the hub.", "auto": "main"},
        "trust_remote_code": {"help": "Run Python code that the model's repository brings."},
    }

    row: Names = option(["1"], "what to show", "Which rows: their numbers in the order of the data, from 1.")
    worst: int | None = option(
        None,
        "what to show",
        "The so many rows that cost the model of --run most, which is read with that run's options.",
        unit="rows",
        auto="none",
        ge=1,
    )
    run: str = option(
        "",
        "what to show",
        "Output folder of a run with a report, for --worst.",
        auto=ADAPTER_DIR,
    )
    html: str | None = option(
        None,
        "what to show",
        "Write a web page of the rows to this file; without --row, of the first 100.",
        auto="the terminal",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.worst is not None and self.is_set("row"):
            raise ConfigError("--row and --worst both say which rows; give one of them")
        if self.run and self.worst is None:
            raise ConfigError(f"--run {self.run} is for --worst N: which rows of that run to show")
        return self
