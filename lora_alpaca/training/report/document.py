"""A document of a few kinds of blocks, as a page that loads nothing, and as Markdown. What rows say is text in both."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_alpaca.data import web_page
from lora_alpaca.data.web_page import as_text
from lora_alpaca.errors import visible

MARK = "<!-- lora-alpaca report -->"
_SIGNS = re.compile(r"([\\`*_\[\]|~#!$]|^[-+=])")  # of Markdown, in a line or at its beginning
_ITEM = re.compile(r"^(\d+)(?=[.)](\s|$))")  # the beginning of a line that is an item of a list
_STYLE = """
  main h2 { font-size: 1.1rem; margin: 34px 0 10px; }
  .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; }
  .cards div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
  .cards b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
  .cards span { color: var(--soft); font-size: 0.8rem; }
  .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 14px;
           margin: 0 0 14px; }
  figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
  figcaption { font-size: 0.85rem; color: var(--soft); padding: 0 4px 4px; }
  figure svg { width: 100%; height: auto; display: block; }
  .wide { overflow-x: auto; margin: 0 0 14px; }
  .words td { white-space: normal; overflow-wrap: anywhere; min-width: 5em; }
  .words td:first-child:not(.number) { min-width: 9em; }
  .words th, .words td { text-align: left; vertical-align: top; }
  .words .number { text-align: right; white-space: nowrap; min-width: 0; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border: 1px solid var(--line);
        border-radius: 8px; padding: 12px 14px; margin: 0 0 14px; }
  h3 { font-size: 0.85rem; color: var(--soft); margin: 0; font-weight: 600; }
  @media print {
    :root { --page: #fff; --card: #fff; --text: #000; --soft: #444; --line: #bbb; --accent: #92400e;
            --second: #0f5e8c; }
    article, figure, .cards { break-inside: avoid; }
    .text { max-height: none; }
  }
"""


@dataclass(frozen=True)
class Heading:
    """The title of a part."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A sentence or two."""

    text: str


@dataclass(frozen=True)
class Code:
    """What is to be typed, or read letter by letter."""

    text: str


@dataclass(frozen=True)
class Cards:
    """Figures that are read first: name and value."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of cells below a head; the columns of these places are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plot:
    """A drawing: SVG of ours, in the page alone."""

    title: str
    svg: str


@dataclass(frozen=True)
class Sample:
    """A row with texts side by side, each with its name and a line of facts."""

    where: str
    prompt: str
    texts: Sequence[tuple[str, str, str]]


Block = Heading | Paragraph | Code | Cards | Table | Plot | Sample


def as_page(title: str, blocks: Sequence[Block]) -> str:
    """Return the page."""
    parts: list[str] = []
    for place, block in enumerate(blocks):
        if isinstance(block, Plot) and not isinstance(blocks[place - 1], Plot):
            parts.append('<div class="plots">')
        parts.append(_html(block))
        if isinstance(block, Plot) and not isinstance((*blocks, None)[place + 1], Plot):
            parts.append("</div>")
    return (
        f'<!doctype html>\n{MARK}\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{as_text(title)}</title>\n<style>{web_page.STYLE}{_STYLE}</style>\n"
        f"<h1>{as_text(title)}</h1>\n<main>\n" + "\n".join(parts) + "\n</main>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{as_text(text)}</h2>"
        case Paragraph(text):
            return f"<p>{as_text(text)}</p>"
        case Code(text):
            return f"<pre>{as_text(text)}</pre>"
        case Cards(items):
            cards = (f"<div><b>{as_text(value)}</b><span>{as_text(name)}</span></div>" for name, value in items)
            return f'<div class="cards">{"".join(cards)}</div>'
        case Plot(title, svg):
            return f"<figure><figcaption>{as_text(title)}</figcaption>{svg}</figure>"
        case Sample(where, prompt, texts):
            columns = "".join(
                f'<section><h3>{as_text(name)}</h3><div class="text">{as_text(text)}</div>'
                f'<div class="facts">{as_text(facts)}</div></section>'
                for name, text, facts in texts
            )
            return (
                f'<article><header><span class="where">{as_text(where)}</span></header>'
                f'<div class="text prompt">{as_text(prompt)}</div><div class="columns">{columns}</div></article>'
            )
        case Table(head, rows, numbers):
            kinds = ['class="number"' if place in numbers else "" for place in range(len(head))]
            lines = (
                "<tr>" + "".join(f"<td {kind}>{as_text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
                for row in rows
            )
            top = "".join(f"<th {kind}>{as_text(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
            return (
                f'<div class="wide"><table class="words"><thead><tr>{top}</thead><tbody>{"".join(lines)}</tbody>'
                "</table></div>"
            )


def as_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return the document as Markdown, without its drawings."""
    parts = [MARK, f"# {_plain(title)}"]
    parts += [text for block in blocks if (text := _markdown(block))]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Code(text):
            return _fenced(text)
        case Cards(items):
            return "\n".join(f"* {_plain(name)}: **{_plain(value)}**" for name, value in items)
        case Plot():
            return ""
        case Sample(where, prompt, texts):
            shown = [f"**{_plain(where)}**", _fenced(prompt)]
            for name, text, facts in texts:
                shown += [f"{_plain(name)} ({_plain(facts)}):" if facts else f"{_plain(name)}:", _fenced(text)]
            return "\n\n".join(shown)
        case Table(head, rows, numbers):
            rule = ["--:" if place in numbers else "---" for place in range(len(head))]
            lines = [[_plain(cell) for cell in row] for row in [head, *rows]]
            return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _plain(text: str) -> str:
    """Return a text as Markdown in one line in which all of it is text."""
    shown = _SIGNS.sub(r"\\\1", " ".join(visible(text).split())).replace("&", "&amp;").replace("<", "&lt;")
    return _ITEM.sub(r"\1\\", shown)


def _fenced(text: str) -> str:
    """Return a text as a block of code, which nothing in it can end."""
    shown = visible(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"
