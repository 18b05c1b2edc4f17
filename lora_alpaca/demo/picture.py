"""Draw the demo's before and after as an SVG file: how many answers are right, and some of them side by side."""

import html
import textwrap

from lora_alpaca.prompts import Conversation

WIDTH, COLUMN, LINE, LETTERS = 960, 460, 19, 58
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
GREY, GREEN, INK, PAPER = "#9a8f80", "#3f7d4e", "#2e2a25", "#fbf8f3"


def draw(answers: list[tuple[Conversation, str, str]], before: float, after: float, questions: int) -> str:
    """Return an SVG with a bar for each share of right answers, and the answers side by side."""
    body: list[str] = []
    y = 34
    body.append(_text(20, y, "base", GREY, bold=True) + _text(20 + COLUMN, y, "after LoRA, merged", GREEN, bold=True))
    y += 16
    for share, x, colour in ((before, 20, GREY), (after, 20 + COLUMN, GREEN)):
        body.append(f'<rect x="{x}" y="{y}" width="{COLUMN - 40}" height="10" rx="5" fill="#e8e0d4"/>')
        body.append(f'<rect x="{x}" y="{y}" width="{share * (COLUMN - 40):.1f}" height="10" rx="5" fill="{colour}"/>')
        body.append(_text(x, y + 30, f"{share:.0%} of {questions} held-out instructions, word for word", colour))
    y += 66
    for row, old, new in answers:
        asked = row.question
        body.append(_text(20, y, "> " + asked.text + (f"  [{asked.input}]" if asked.input else ""), INK, bold=True))
        y += LINE + 3
        columns = [_wrapped(old, 6), _wrapped(new, 6)]
        for lines, x, colour in ((columns[0], 20, GREY), (columns[1], 20 + COLUMN, INK)):
            body.extend(_text(x, y + number * LINE, line, colour) for number, line in enumerate(lines))
        y += LINE * max(map(len, columns)) + 18
    frame = f'<rect width="{WIDTH}" height="{y}" rx="12" fill="{PAPER}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="{FONT}" font-size="13">'
    return "\n".join([head, frame, *body, "</svg>", ""])


def _wrapped(text: str, limit: int) -> list[str]:
    """Return a text in lines of a column, cut after `limit` lines with an ellipsis."""
    lines = textwrap.wrap(text, LETTERS - 4) or ["(nothing)"]
    return lines if len(lines) <= limit else [*lines[: limit - 1], lines[limit - 1] + " ..."]


def _text(x: float, y: float, text: str, colour: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" fill="{colour}"{weight}>{html.escape(text)}</text>'
