"""Rows as training sees them: every token, learned or not, in the terminal's colours or on a web page of its own."""

import html
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path

from lora_alpaca.config import ShowConfig
from lora_alpaca.config.shared import ADAPTER_DIR, DEMO, BaseModelOptions, DataOptions
from lora_alpaca.data import Rows, row_losses
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Example
from lora_alpaca.data.preparation import are_documents
from lora_alpaca.data.row_losses import RowLoss
from lora_alpaca.errors import ConfigError, DataError, FolderError, visible
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import Conversation, fitting_template, load_template
from lora_alpaca.storage import atomic
from lora_alpaca.storage.paths import user_path

ROWS_ON_A_PAGE = 100
READ_WITH = {*DataOptions.model_fields, *BaseModelOptions.model_fields}  # the options by which a run reads its rows
_MARK = "<!-- lora-alpaca show -->"
_LEARNED, _SEEN, _CUT, _PLAIN = ("\033[30;42m", "\033[30;102m"), "\033[2m", "\033[9;31m", "\033[0m"  # two greens
Token = tuple[str, str]  # its text, and whether it is learned, seen or cut


@dataclass(frozen=True)
class Shown:
    """A row as it is shown: where it is from, one line on it, and its tokens."""

    where: str
    summary: str
    tokens: list[Token]


def show(config: ShowConfig) -> None:
    """Print the rows that a config names, or write them to a page. Raises what training on them would raise."""
    target = None if config.html is None else _target(user_path(config.html))
    found = _worst(config) if config.worst is not None else [_named(config, target is not None)]
    coloured = "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    if target is None:
        print(*(_in_terminal(row, coloured) for _, rows in found for row in rows), sep="\n\n")
        return
    of_rows = [row for _, rows in found for row in rows]
    atomic.remove_hidden(target.parent, of=target.name, locked=False)
    atomic.replace(target, page(visible(found[0][0]), of_rows).encode())
    print(f"{len(of_rows)} rows written to {visible(str(target))}")


def _named(config: ShowConfig, on_page: bool) -> tuple[str, list[Shown]]:
    """Return a title and the rows of the numbers that a config names; on a page, without any, the first ones."""
    _check_template(config)
    rows = _rows(config)
    everything = on_page and not config.is_set("row")
    numbers = range(1, ROWS_ON_A_PAGE + 1) if everything else _numbers(config.row, len(rows))
    return _shown(config, rows, dict.fromkeys(numbers, ""))


def _worst(config: ShowConfig) -> list[tuple[str, list[Shown]]]:
    """Return the rows that cost a run's model most, the highest loss first, by the file that they are numbered in.

    They are read with the options of that run, but for those that are set. Raises DataError where there are no losses.
    """
    folder = user_path(config.run or ADAPTER_DIR)
    losses, facts = row_losses.read(folder / row_losses.FILE)
    known = {name: value for name, value in facts["options"].items() if name in READ_WITH and value is not None}
    said = {name: getattr(config, name) for name in config.model_fields_set & READ_WITH}
    options = ShowConfig(**known | said)
    highest = sorted((row for row in losses if row.loss is not None), key=lambda row: -(row.loss or 0.0))
    apart = facts["options"].get("val_data_path")
    found = []
    for path, part in ((options.data_path, "training"), (apart, "validation")) if apart else ((options.data_path, ""),):
        chosen = [row for row in highest[: config.worst] if not part or row.part == part]
        notes = {row.number: f"{row.part}, {row.costs}" for row in chosen}
        if not notes:
            continue
        one = options.model_copy(update={"data_path": path})
        _check_template(one)
        rows = _rows(one)
        if max(notes) > len(rows) or any(row.where not in ("", where) for row, where in _wheres(rows, chosen)):
            raise DataError(
                f"{path}: not the rows of the run in {folder} any more; name a run of these rows with --run"
            )
        found.append(_shown(one, rows, notes))
    return found


def _wheres(rows: Rows, chosen: Sequence[RowLoss]) -> Iterator[tuple[RowLoss, str]]:
    """Yield the chosen rows, each with where the row of its number is now."""
    of_number = {row.number: row for row in chosen}
    for number, row in enumerate(rows, start=1):
        if number in of_number:
            yield of_number[number], row.where


def _check_template(config: ShowConfig) -> None:
    """Raise TemplateError, before anything is read, where the template that a config names is none."""
    if config.prompt_template_name:
        load_template(config.prompt_template_name)


def _rows(config: ShowConfig) -> Rows:
    return Rows(config.data_path or DEMO, config.columns, config.skip_bad_rows, config.ignore_fields)


def _shown(config: ShowConfig, rows: Rows, notes: Mapping[int, str]) -> tuple[str, list[Shown]]:
    """Return a title, and the rows of some numbers, from 1, in the order of their notes, which are told with them."""
    template = load_template(config.prompt_template_name) if config.prompt_template_name else None
    base = locate_base(config.base_model or DEMO, config.revision, config.trust_remote_code)
    tokenizer, said = load_tokenizer(base)
    print(*(f"{visible(note)}\n" for note in [*rows.notes, *said]), sep="", end="", file=sys.stderr)
    template = (template or fitting_template(rows.formats, tokenizer)).bound(tokenizer)
    encoder = Encoder.from_options(tokenizer, template, config, base.vocabulary)
    of_number = {number: row for number, row in enumerate(rows, start=1) if number in notes}
    chosen = [number for number in notes if number in of_number]
    encoded = encoder.encode_rows([of_number[number] for number in chosen])
    joined = are_documents(rows)
    of_rows = [
        shown(of_number[number], example, encoder, joined, notes[number])
        for number, examples in zip(chosen, encoded, strict=True)
        for example in examples
    ]
    return f"{config.data_path or DEMO}, template {template.name}, tokenizer of {base.name}", of_rows


def _numbers(given: Sequence[str], rows: int) -> list[int]:
    for number in given:
        if not number.isdecimal() or not 1 <= int(number) <= rows:
            raise ConfigError(f"--row {number}: the rows have the numbers 1 to {rows}")
    return [int(number) for number in given]


def _target(path: Path) -> Path:
    """Return the path of a page, having made sure that nothing but an earlier page of ours is written over."""
    if os.path.lexists(path) and not _is_page(path):
        raise FolderError(f"--html {path}: there is something else under this name; choose another")
    if not path.parent.is_dir():
        raise FolderError(f"--html {path}: the folder {path.parent} does not exist")
    return path


def _is_page(path: Path) -> bool:
    """Return whether a file, and no link to one, is a page of ours."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return _MARK.encode() in file.read(500)


def tokens(encoded: Example, encoder: Encoder) -> list[Token]:
    """Return the tokens of a row as (text, learned | seen | cut). The texts joined are the row, made visible."""
    kept = _kept(encoded, encoder)
    kinds = ["learned" if learned else "seen" for learned in kept.mask()]
    kinds += ["cut"] * (len(encoded.ids) - len(kinds))
    return list(zip(map(visible, encoder.text.pieces(encoded.ids.tolist())), kinds, strict=True))


def _kept(encoded: Example, encoder: Encoder) -> Example:
    """Return what training keeps of a row that is no document."""
    cutoff = encoder.choices.cutoff_len
    if len(encoded.ids) <= cutoff:
        return encoded
    return encoded.cut(cutoff if encoder.choices.overlong == "truncate" else 0)


def _summary(encoded: Example, encoder: Encoder) -> str:
    kept, cutoff, overlong = _kept(encoded, encoder), encoder.choices.cutoff_len, encoder.choices.overlong
    lost = len(encoded.ids) - len(kept.ids)
    if lost and overlong != "truncate":
        what = "the row is dropped" if overlong == "drop" else "an error"
        return f"{lost} tokens, more than --cutoff_len {cutoff}: {what} (--overlong {overlong})"
    cut = f", {lost} cut off at --cutoff_len {cutoff}" if lost else ""
    if not kept.num_labels():
        cut += "; nothing is left to learn, the row is dropped"
    return f"{len(kept.ids)} tokens, {kept.mask().sum()} of them learned{cut}"


def shown(row: Conversation, encoded: Example, encoder: Encoder, joined: bool, note: str = "") -> Shown:
    """Return a row as it is shown; `joined` says that the rows are documents, which training puts end to end."""
    note = f"{note}; " if note else ""
    if not joined:
        return Shown(visible(row.where), note + _summary(encoded, encoder), tokens(encoded, encoder))
    pieces = map(visible, encoder.text.pieces(encoded.ids.tolist()))
    blocks = f"documents are put end to end and learned in blocks of --cutoff_len {encoder.choices.cutoff_len}"
    return Shown(
        visible(row.where), f"{note}{len(encoded.ids)} tokens; {blocks}", [(text, "learned") for text in pieces]
    )


# ---------------------------------------------------------------------------------------------------------- terminal


def _in_terminal(row: Shown, coloured: bool) -> str:
    """Return a row for the terminal: learned tokens on green, what is cut struck out; without colours, in brackets."""
    found = row.tokens
    if coloured:
        greens = cycle(_LEARNED)
        colours = {"seen": _SEEN, "cut": _CUT}
        body = "".join(_lines_coloured(text, colours.get(kind) or next(greens)) for text, kind in _alternating(found))
        legend = f"{_LEARNED[0]}learned{_PLAIN} {_SEEN}seen{_PLAIN} {_CUT}cut{_PLAIN}"
    else:
        brackets = {"learned": ("\u27e6", "\u27e7"), "seen": ("", ""), "cut": ("\u27e8", "\u27e9")}
        parts = groupby(found, key=lambda token: token[1])
        body = ""
        for kind, group in parts:
            between = "|" if kind == "learned" else ""
            body += brackets[kind][0] + between.join(text for text, _ in group) + brackets[kind][1]
        legend = "\u27e6learned|token|by|token\u27e7 seen \u27e8cut\u27e9"
    return f"{row.where}: {row.summary}   {legend}\n{body}"


def _alternating(found: Sequence[Token]) -> Iterator[Token]:
    """Yield learned tokens one by one, so that their borders can be seen, and others in stretches."""
    for kind, group in groupby(found, key=lambda token: token[1]):
        texts = [text for text, _ in group]
        yield from [(text, kind) for text in texts] if kind == "learned" else [("".join(texts), kind)]


def _lines_coloured(text: str, colour: str) -> str:
    """Return a text in a colour that ends with every line, so that a terminal does not paint to its edge."""
    return "\n".join(f"{colour}{line}{_PLAIN}" if line else "" for line in text.split("\n"))


# -------------------------------------------------------------------------------------------------------------- page

_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2024;
       background: #fff }
h1 { font-size: 1.2rem; overflow-wrap: anywhere }
h2 { font-size: .95rem; margin: 2rem 0 .4rem } small { color: #60646c; font-weight: 400 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem 1rem; border: 1px solid #d9d9e0;
      border-radius: .4rem; margin: 0 }
.learned { background: #c4e8d1; border-radius: .15rem; box-shadow: inset -1px 0 #fff }
.seen { color: #60646c } .cut { color: #ce2c31; text-decoration: line-through }
@media (prefers-color-scheme: dark) {
  body { background: #111113; color: #edeef0 } pre { border-color: #363a3f }
  .learned { background: #20573e; box-shadow: inset -1px 0 #111113 }
  .seen, small { color: #b0b4ba } .cut { color: #ff9592 }
}
"""


def page(title: str, rows: Sequence[Shown]) -> str:
    """Return a web page of rows that needs nothing but itself; whatever the rows contain is text on it."""
    sections = []
    for row in rows:
        spans = "".join(f'<span class="{kind}">{html.escape(text)}</span>' for text, kind in _alternating(row.tokens))
        sections.append(f"<h2>{html.escape(row.where)} <small>{row.summary}</small></h2>\n<pre>{spans}</pre>")
    legend = '<span class="learned">learned</span> <span class="seen">seen</span> <span class="cut">cut off</span>'
    return (
        f'<!doctype html>{_MARK}\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<p>{legend}</p>\n"
        + "\n".join(sections)
        + "\n</html>\n"
    )
