"""The files of a report, drawn from its facts."""

from typing import Any

from lora_alpaca.storage import atomic
from lora_alpaca.training.report import content, files, plots, rates
from lora_alpaca.training.report.document import as_markdown, as_page


def drawn(facts: dict[str, Any], output_dir: str) -> dict[str, bytes]:
    """Return the files of a report but for the table of rows; the folder is that which its commands name."""
    title, blocks = content.document(facts, output_dir)
    curve = rates.curve(facts["record"])
    return {
        files.PAGE: as_page(title, blocks).encode(),
        files.TEXT: as_markdown(title, blocks).encode(),
        files.FACTS: atomic.as_json(facts),
    } | ({files.RATES: plots.alone(curve).encode()} if curve else {})
