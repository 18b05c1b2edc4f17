"""Draw the rooms of the library and what they import as docs/architecture.svg: python docs/draw_architecture.py.

Names, captions, files and arrows are read from the code; only the order of the rooms is written here. An arrow that
follows from others is left out: where A imports B and B imports C, none is drawn from A to C.
"""

import ast
import html
import re
import textwrap
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "lora_alpaca"
TIERS = {  # from the bottom up; in a tier from left to right
    "foundation": ["errors", "signals", "storage", "config"],
    "material": ["prompts", "models", "data", "artifacts"],
    "machinery": ["engine", "distributed", "planning"],
    "tasks": ["training", "inference", "evaluation", "export"],
    "commands": ["selftest", "cli"],
}
ROOMS = [room for rooms in TIERS.values() for room in rooms]

BOX, GAP, MARGIN, BETWEEN = 236, 40, 64, 72  # width of a room, between two, around all, between two tiers
WIDTH = 2 * MARGIN + 4 * BOX + 3 * GAP - 24
CAPTION, FILES = 31, 32  # letters in a line of a room that is not wide
SANS = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
LEGEND = (
    "An arrow means “imports”, a dashed one “when a command is run”. A room imports only from rooms below it or to its "
    "left. Arrows that follow from others are left out."
)
STYLE = f"""
  svg {{ --paper: #fbf8f3; --box: #ffffff; --ink: #2e2a25; --grey: #857a6b; --edge: #dccfbd;
        --foundation: #8a7b66; --material: #3f7d4e; --machinery: #2f6f8f; --tasks: #a4552d; --commands: #6d4a8d; }}
  @media (prefers-color-scheme: dark) {{
    svg {{ --paper: #1d1a17; --box: #292521; --ink: #efe7db; --grey: #a89c8b; --edge: #4a433a;
          --foundation: #b5a58d; --material: #74b884; --machinery: #6bb1d4; --tasks: #e0906a; --commands: #b492d6; }}
  }}
  text {{ font-family: {SANS}; fill: var(--grey); font-size: 12px; }}
  .name {{ font-size: 17px; font-weight: 650; fill: var(--ink); }}
  .caption {{ font-size: 12.5px; fill: var(--ink); }}
  .files {{ font-family: {MONO}; font-size: 10.5px; }}
  .tier {{ font-size: 12px; letter-spacing: 2px; }}
  .box {{ fill: var(--box); stroke: var(--edge); }}
  .arrow {{ fill: none; stroke-width: 1.5; opacity: 0.75; }}
"""


# ------------------------------------------------------------------------------------------------------- the code


def files(room: str) -> list[Path]:
    """Return the files of a room, its own docstring's first."""
    folder = PACKAGE / room
    return (
        [folder / "__init__.py", *sorted(folder.rglob("[!_]*.py"))] if folder.is_dir() else [folder.with_suffix(".py")]
    )


def imported(room: str) -> tuple[set[str], set[str]]:
    """Return the earlier rooms that a room imports, and those that it names as "room.module:function" for later.

    An import against the order is not drawn; tests/test_architecture.py refuses it.
    """
    now, later = set(), set()
    for path in files(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                now |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                now |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                later |= set(re.findall(r"^([a-z_]+)[a-z_.]*:[a-z_]+$", node.value))
    now = {name.split(".")[1] for name in now if name.startswith("lora_alpaca.")}
    earlier = set(ROOMS[: ROOMS.index(room)])
    return now & earlier, later & earlier - now


def arrows() -> list[tuple[str, str, bool]]:
    """Return (importing room, imported room, whether only when a command is run), without what follows from others."""
    found = {room: imported(room) for room in ROOMS}
    reached: dict[str, set[str]] = {}
    for room in ROOMS:  # those below are known by now
        below = found[room][0] | found[room][1]
        reached[room] = below.union(*(reached.get(other, set()) for other in below))
    drawn = []
    for room, (now, later) in found.items():
        for other in sorted(now | later, key=ROOMS.index):
            if not any(other in reached.get(between, ()) for between in now | later if between != other):
                drawn.append((room, other, other in later))
    return drawn


def caption(room: str) -> list[str]:
    """Return the first sentence of a room's docstring in at most three lines, cut at its colon if it is longer."""
    text = ast.get_docstring(ast.parse(files(room)[0].read_text(encoding="utf-8"))) or ""
    sentence = " ".join(re.split(r"\.\s|\.$|\n\n", text)[0].split()).replace("`", "")
    letters = CAPTION if in_row(room) > 1 else 3 * CAPTION
    lines = textwrap.wrap(sentence, letters)
    return lines if len(lines) <= 3 else textwrap.wrap(sentence.partition(":")[0], letters)[:3]


def in_row(room: str) -> int:
    """Return how many rooms a room's tier has."""
    return next(len(rooms) for rooms in TIERS.values() if room in rooms)


def modules(room: str) -> list[str]:
    """Return the names of a room's modules, and of folders of modules, in lines."""
    names = dict.fromkeys(path.relative_to(PACKAGE / room).parts[0].removesuffix(".py") for path in files(room)[1:])
    return textwrap.wrap("  ".join(names), FILES, break_on_hyphens=False)


# ---------------------------------------------------------------------------------------------------- the picture


class Layout:
    """Where each room is, and how to get from one to another between the others."""

    def __init__(self) -> None:
        self.tier = {room: name for name, rooms in TIERS.items() for room in rooms}
        self.left: dict[str, float] = {}
        self.width: dict[str, float] = {}
        self.top: dict[str, float] = {}
        self.height: dict[str, float] = {}
        y = 36.0
        for name, rooms in reversed(TIERS.items()):
            heights = [17 * len(caption(room)) + 14 * len(modules(room)) + 8 * bool(modules(room)) for room in rooms]
            self.top[name], self.height[name] = y, 44 + max(heights)
            y += self.height[name] + BETWEEN
            inset = (4 - len(rooms)) * (BOX + GAP) / 2
            for number, room in enumerate(rooms):
                self.left[room] = MARGIN + inset + number * (BOX + GAP)
                self.width[room] = BOX
            if len(rooms) == 1:
                self.left[rooms[0]], self.width[rooms[0]] = MARGIN + (BOX + GAP) / 2, 3 * BOX + 2 * GAP
        self.bottom = y - BETWEEN + 76

    def middle(self, room: str) -> float:
        """Return the x of a room's middle."""
        return self.left[room] + self.width[room] / 2

    def gap(self, tier: str, x: float) -> float:
        """Return the x nearest to the given one at which a line passes between the rooms of a tier."""
        rooms = TIERS[tier]
        gaps = [self.left[room] - GAP / 2 for room in rooms]
        return min([*gaps, self.left[rooms[-1]] + self.width[rooms[-1]] + GAP / 2], key=lambda gap: abs(gap - x))

    def path(self, start: str, end: str, leaves: float, arrives: float) -> str:
        """Return the path of an arrow between rooms, from x `leaves` to x `arrives` on their edges."""
        here, there = self.tier[start], self.tier[end]
        bottom = self.top[here] + self.height[here]
        if here == there:
            if TIERS[here].index(start) - TIERS[here].index(end) == 1:
                y = self.top[here] + 24
                return f"M{self.left[start]:.0f},{y:.0f} H{self.left[end] + self.width[end] + 2:.0f}"
            dip = bottom + 36
            over = f"{leaves:.0f},{dip:.0f} {arrives:.0f},{dip:.0f}"
            return f"M{leaves:.0f},{bottom:.0f} C{over} {arrives:.0f},{bottom + 2:.0f}"
        names = list(reversed(TIERS))
        between = names[names.index(here) + 1 : names.index(there)]
        points = [(leaves, bottom)]
        for number, name in enumerate(between, start=1):
            x = self.gap(name, leaves + (arrives - leaves) * number / (len(between) + 1))
            points += [(x, self.top[name] - 6), (x, self.top[name] + self.height[name] + 6)]
        points.append((arrives, self.top[there] - 2))
        steps = [f"M{leaves:.0f},{bottom:.0f}"]
        for (x, y), (to_x, to_y) in pairwise(points):
            half = (y + to_y) / 2
            steps.append(f"C{x:.0f},{half:.0f} {to_x:.0f},{half:.0f} {to_x:.0f},{to_y:.0f}")
        return " ".join(steps)


def ends(layout: Layout, drawn: list[tuple[str, str, bool]]) -> dict[tuple[str, str, str], float]:
    """Return the x of both ends of each arrow, spread over the edge of a room in the order of the other ends."""
    at_edge = defaultdict(list)
    for start, end, _ in drawn:
        same = layout.tier[start] == layout.tier[end]
        if same and abs(ROOMS.index(start) - ROOMS.index(end)) == 1:
            continue
        at_edge[start, "bottom"].append((start, end, "leaves", end))
        at_edge[end, "bottom" if same else "top"].append((start, end, "arrives", start))
    found = {}
    for (room, _), touching in at_edge.items():
        touching.sort(key=lambda arrow: layout.middle(arrow[3]))
        for number, (start, end, what, other) in enumerate(touching):
            if layout.width[room] > BOX:
                x = layout.middle(other)  # a wide room: straight down
            else:
                x = layout.left[room] + layout.width[room] * (number + 1) / (len(touching) + 1)
            found[start, end, what] = x
    return found


def draw() -> str:
    """Return the picture as SVG."""
    layout, drawn = Layout(), arrows()
    at, height = ends(layout, drawn), layout.bottom
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img">',
        f"<title>The rooms of lora_alpaca and what they import</title>\n<style>{STYLE}</style>\n<defs>",
        *(
            f'<marker id="{tier}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0.5 L8,4 L0,7.5 z" fill="var(--{tier})"/></marker>'
            for tier in TIERS
        ),
        f'</defs>\n<rect width="{WIDTH}" height="{height:.0f}" rx="12" fill="var(--paper)"/>',
    ]
    for start, end, later in drawn:
        tier = layout.tier[start]
        line = layout.path(start, end, at.get((start, end, "leaves"), 0), at.get((start, end, "arrives"), 0))
        dashes = ' stroke-dasharray="5 4"' if later else ""
        body.append(
            f'<path class="arrow" d="{line}" stroke="var(--{tier})"{dashes} marker-end="url(#{tier})">'
            f"<title>{start} imports {end}</title></path>"
        )
    for tier, rooms in TIERS.items():
        y = layout.top[tier] + layout.height[tier] / 2
        body.append(
            f'<text class="tier" transform="translate(34 {y:.0f}) rotate(-90)" text-anchor="middle" '
            f'style="fill: var(--{tier})">{tier}</text>'
        )
        body += [line for room in rooms for line in drawn_room(layout, room)]
    return "\n".join([*body, text("legend", MARGIN, height - 24, LEGEND), "</svg>", ""])


def drawn_room(layout: Layout, room: str) -> list[str]:
    """Return the elements of a room: its box, name, number, caption and modules."""
    tier, x, width = layout.tier[room], layout.left[room], layout.width[room]
    y, height = layout.top[tier], layout.height[tier]
    box = f'<rect class="box" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="8"/>'
    stripe = f'<rect x="{x:.0f}" y="{y + 8:.0f}" width="4" height="{height - 16:.0f}" rx="2" fill="var(--{tier})"/>'
    number = f'<text x="{x + width - 14:.0f}" y="{y + 26:.0f}" text-anchor="end">{ROOMS.index(room) + 1}</text>'
    lines = [box, stripe, number, text("name", x + 18, y + 28, room)]
    y += 50
    for line in caption(room):
        lines.append(text("caption", x + 18, y, line))
        y += 17
    y = layout.top[tier] + height - 12 - 14 * (len(modules(room)) - 1)
    return lines + [text("files", x + 18, y + 14 * number, line) for number, line in enumerate(modules(room))]


def text(kind: str, x: float, y: float, words: str) -> str:
    """Return a line of text."""
    return f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}">{html.escape(words)}</text>'


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(draw(), encoding="utf-8")
