"""Write the table of docs/cost.md, by the command that anybody can give: python docs/cost_table.py"""

import re
import tempfile
from pathlib import Path

import transformers

from lora_alpaca.config import EstimateConfig
from lora_alpaca.planning.devices import TABLE
from lora_alpaca.planning.forecast import Forecast
from lora_alpaca.training.estimating.estimating import forecast

PAGE = Path(__file__).parent / "cost.md"
MARK = re.compile(r"(<!-- cost -->\n).*?(<!-- end cost -->)", re.DOTALL)
ROWS, MEAN = 51_760, 122
PRECISIONS = {
    "8 bits": {"load_8bit": True},
    "4 bits": {"load_4bit": True},
    "16 bits": {"load_8bit": False},
    "full": {"tune": "full"},
}


def cell(found: Forecast) -> str:
    """Return memory and time of a run, or the cheapest change with which it fits."""
    if found.fits:
        return f"{found.peak / 1e9:.1f} GB, {_duration(found.total_seconds)}"
    if not found.remedies:
        return "too large"
    one = found.remedies[0]
    return f"{found.peak / 1e9:.1f} GB: no; `{one.options}`, x {one.times:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86_400:.0f} days"


def row(name: str) -> str:
    """Return the line of a device."""
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaConfig(vocab_size=32000, dtype="float16").save_pretrained(folder)
        common = {"base_model": folder, "on": name, "rows": ROWS, "mean_tokens": MEAN}
        found = [forecast(EstimateConfig(**common, **options)) for options in PRECISIONS.values()]
    return f"| {TABLE[name].name} | {' | '.join(map(cell, found))} |"


def section() -> str:
    """Return what stands between the marks."""
    head = [f"| device | {' | '.join(PRECISIONS)} |", "|---|" + "---|" * len(PRECISIONS)]
    return "\n".join([*head, *map(row, TABLE)])


def main() -> None:
    """Put the table between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARK.sub(lambda found: f"{found[1]}{section()}\n{found[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
