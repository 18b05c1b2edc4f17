"""The curves of a run as SVG in the colours of the page that they are on. matplotlib draws them, where it is there."""

import io
import logging
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from lora_alpaca.training.report.document import MARK, Plot

MISSING = 'For the curves: pip install "lora-alpaca[report]", then lora-alpaca report'
Points = Sequence[tuple[float, float]]
Curves = Mapping[str, Points]  # name -> points
_COLOURS = {"#010101": "--text", "#020202": "--soft", "#030303": "--line", "#040404": "--accent", "#050505": "--second"}
_PLAIN = {"--text": "#1a1a1a", "--soft": "#666666", "--line": "#dddddd", "--accent": "#1769aa", "--second": "#c2570c"}
_LINES = ("#040404", "#050505", "#020202")
_SIZE = (4.6, 2.5)  # inches; the page scales it
MOST_POINTS = 1000  # of a curve


def available() -> bool:
    """Return whether there is a library to draw with."""
    return find_spec("matplotlib") is not None


def curve(title: str, curves: Curves, unit: str = "", log: bool = False, over: str = "step") -> Plot:
    """Return curves over the steps of a run, or over something else, with `log` on logarithmic axes; each has a name
    where there are several.
    """

    def draw(axes: Any) -> None:
        for (name, points), colour in zip(curves.items(), _LINES, strict=False):
            shown = _thinned(points)
            mark = "." if len(shown) < 40 else ""
            axes.plot(*zip(*shown, strict=True), color=colour, label=name, linewidth=1.4, marker=mark, markersize=4)
        axes.set_xlabel(over)
        axes.set_ylabel(unit)
        if log:
            axes.set_xscale("log")
            axes.set_yscale("log")
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8)

    return Plot(title, _svg(title, draw))


def alone(plot: Plot) -> str:
    """Return a drawing as a file of its own: dark on white, for there is no page with colours around it."""
    svg = plot.svg
    for name, colour in _PLAIN.items():
        svg = svg.replace(f"var({name})", colour)
    opening = svg.index(">") + 1
    return f'{MARK}\n{svg[:opening]}<rect width="100%" height="100%" fill="#ffffff"/>{svg[opening:]}\n'


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], unit: str) -> Plot:
    """Return counts between edges as bars."""

    def draw(axes: Any) -> None:
        axes.stairs(counts, edges, fill=True, color=_LINES[0])
        axes.set_xlabel(unit)
        axes.set_ylabel("rows")

    return Plot(title, _svg(title, draw))


def _thinned(points: Points) -> Points:
    """Return at most so many points, the last one among them."""
    every = -(-len(points) // MOST_POINTS)
    return points[(len(points) - 1) % every :: every]


def _svg(title: str, draw: Any) -> str:
    """Return a drawing as an SVG element whose texts are text and whose colours are the page's."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells where it keeps its fonts
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text, soft, line = "#010101", "#020202", "#030303"
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # the same drawing at every run, and names that no other drawing on the page has
        "font.size": 9,
        "text.color": text,
        "axes.labelcolor": soft,
        "axes.edgecolor": line,
        "xtick.color": soft,
        "ytick.color": soft,
        "grid.color": line,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(True, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    found = buffer.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)
    for colour, name in _COLOURS.items():
        found = found.replace(colour, f"var({name})")
    return re.sub(r"'DejaVu Sans'[^;\"]*?sans-serif", "system-ui, sans-serif", found)
