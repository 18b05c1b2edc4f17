"""Draw docs/convergence.svg from the newest results: python benchmarks/curves.py"""

import math
from typing import Any

from tables import ROOT, newest

from lora_alpaca.demo.picture import FONT, INK, PAPER

PICTURE = ROOT / "docs" / "convergence.svg"
PANEL, HEIGHT = 480, 380
LEFT, RIGHT, TOP, BOTTOM = 66, 22, 84, 58  # margins of a panel's axes
GRID = "#e3dacb"
LINES = {  # who: colour, width, opacity; the wide ones lie below
    "recipe": ("#d9772b", 4.5, 0.45),
    "ours": ("#1d5f8a", 1.3, 1),
}
NAMES = {"recipe": "alpaca-lora recipe", "ours": "ours", "demo": "demo rows", "alpaca": "Alpaca rows"}


def draw() -> None:
    """Write the picture: a panel for every set of rows, in it a line for every seed of both."""
    tasks = newest("convergence")["tasks"]
    width = PANEL * len(tasks)
    body = [f'<rect width="{width}" height="{HEIGHT}" rx="12" fill="{PAPER}"/>', *_legend()]
    for number, (name, found) in enumerate(tasks.items()):
        title = f"{NAMES[name]}: {found['rows']}, {found['num_epochs']} epochs"
        body += _panel(number * PANEL, title, found["runs"])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-size="13"'
    PICTURE.write_text("\n".join([f'{head} font-family="{FONT}">', *body, "</svg>", ""]), encoding="utf-8")


def _legend() -> list[str]:
    body, x = [], LEFT
    for name, line in reversed(LINES.items()):
        body += [_line([(x, 26), (x + 30, 26)], line), _text(x + 38, 30, NAMES[name])]
        x += 110
    return body


def _panel(left: float, title: str, runs: dict[str, Any]) -> list[str]:
    """Return title, axes, grid and lines of one set of rows; the loss is on a log axis if it falls far."""
    lines = [(LINES[name], run["validation"]) for name in LINES for run in runs[name].values()]
    losses = [loss for _, curve in lines for loss in curve.values()]
    last, low, high = max(int(step) for _, curve in lines for step in curve), min(losses), max(losses)
    log = high > 10 * low
    scale = math.log if log else float
    margin = 0.05 * (scale(high) - scale(low))
    x0, x1, y0, y1 = left + LEFT, left + PANEL - RIGHT, HEIGHT - BOTTOM, TOP

    def at(step: float, loss: float) -> tuple[float, float]:
        up = (scale(loss) - scale(low) + margin) / (scale(high) - scale(low) + 2 * margin)
        return x0 + step / last * (x1 - x0), y0 + up * (y1 - y0)

    body = [_text(x0, TOP - 16, title, weight="bold")]
    for loss in _log_ticks(low, high) if log else _ticks(low, high):
        y = at(0, loss)[1]
        body += [_line([(x0, y), (x1, y)], (GRID, 1, 1)), _text(x0 - 8, y + 4, f"{loss:g}", "end")]
    for step in _ticks(0, last):
        x = at(step, low)[0]
        body += [_line([(x, y0), (x, y0 + 5)], (INK, 1, 1)), _text(x, y0 + 20, f"{step:g}", "middle")]
    body += [_line([(x0, y0), (x1, y0)], (INK, 1, 1)), _text((x0 + x1) / 2, y0 + 42, "optimizer steps", "middle")]
    label = "validation loss" + ", log scale" * log
    x, y = left + 18, (y0 + y1) / 2
    body.append(f'<g transform="rotate(-90 {x} {y})">{_text(x, y, label, "middle")}</g>')
    return body + [_line([at(int(step), loss) for step, loss in curve.items()], line) for line, curve in lines]


def _ticks(low: float, high: float) -> list[float]:
    """Return at most seven round numbers from low to high."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(unit * times for times in (1, 2, 5, 10) if (high - low) / (unit * times) <= 6)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for times in (1, 2, 5) if low <= (tick := times * 10.0**power) <= high]


def _line(points: list[tuple[float, float]], line: tuple[str, float, float]) -> str:
    colour, width, opacity = line
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f'stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"'
    return f'<polyline points="{places}" fill="none" {style}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text {place} fill="{INK}">{text}</text>'


if __name__ == "__main__":
    draw()
