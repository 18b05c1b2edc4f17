"""The micro world: tables of true facts and the sentences that state them.

A table is a text file in `tables/`, one row per line. A relation turns each row of its table into a `Fact`: a subject,
ways to ask about it, and the one sentence that answers. All wording lives in `tables/relations.toml` and
`tables/paragraphs.toml`; this module only fills in the blanks.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLES = Path(__file__).parent / "tables"

Blanks = dict[str, str]  # what may stand between braces in a wording -> the words to put there


@dataclass(frozen=True)
class Fact:
    """One row of a table, seen through one relation, with every wording filled in."""

    relation: str
    subject: str  # "alpaca"
    topic: str  # what the fact is about, at large; facts with the same topic stay together in a split
    label: str  # "Animal: alpaca"
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    orders: tuple[str, ...]  # questions that name no subject: the label has to say it


@dataclass(frozen=True)
class Portrait:
    """A paragraph about a whole row of a table."""

    topic: str
    heading: str
    requests: tuple[str, ...]
    sentences: tuple[str, ...]
    asides: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


@cache
def facts() -> list[Fact]:
    """Return all facts of all relations."""
    return [
        _fact(name, relation, blanks)
        for name, relation in _read_toml("relations").items()
        for blanks in _rows(relation["table"])
    ]


@cache
def portraits() -> list[Portrait]:
    """Return a paragraph about each country and each animal."""
    return [
        Portrait(
            topic=_first(blanks),
            heading=wording["heading"].format(**blanks),
            **{part: _fill(wording[part], blanks) for part in ("requests", "sentences", "asides")},
        )
        for table, wording in _read_toml("paragraphs").items()
        for blanks in _rows(table)
    ]


def _fact(name: str, relation: dict, blanks: Blanks) -> Fact:
    subject = relation["subject"].format(**blanks) if "subject" in relation else _first(blanks)
    topic = relation.get("topic", "").format(**blanks) or subject
    return Fact(
        relation=name,
        subject=subject,
        # A frog's colour goes with the other facts about frogs, and "hot cold" is the same pair as "cold hot".
        topic=" ".join(sorted(topic.removeprefix("a ").removeprefix("an ").split())),
        label=relation["label"].format(**blanks),
        answer=relation["answer"].format(**blanks),
        **{part: _fill(relation[part], blanks) for part in ("statements", "questions", "orders")},
    )


def _first(blanks: Blanks) -> str:
    return next(iter(blanks.values()))


def _fill(wordings: list[str], blanks: Blanks) -> tuple[str, ...]:
    return tuple(wording.format(**blanks) for wording in wordings)


@cache
def _rows(table: str) -> list[Blanks]:
    """Return the rows of a table, each with the capitalised and the article-bearing forms of its columns."""
    if table in ("sums", "products"):
        rows = _arithmetic(table)
    else:
        header, *lines = (TABLES / f"{table}.txt").read_text(encoding="utf-8").splitlines()
        columns = header.split(" | ")
        rows = [dict(zip(columns, line.split(" | "), strict=True)) for line in lines]
    if table in ("opposites", "rhymes"):  # these hold in both directions
        rows += [{"word": row["other"], "other": row["word"]} for row in rows]
    return [_with_forms(row) for row in rows]


def _arithmetic(table: str) -> list[dict[str, str]]:
    """Return 0 + 0 to 10 + 10, or 1 x 1 to 10 x 10, in both orders."""
    first = 0 if table == "sums" else 1
    return [
        {
            "a": str(a),
            "b": str(b),
            "low": str(min(a, b)),
            "high": str(max(a, b)),
            table.removesuffix("s"): str(a + b if table == "sums" else a * b),
        }
        for a in range(first, 11)
        for b in range(first, 11)
    ]


def _with_forms(row: dict[str, str]) -> Blanks:
    """Add to each column `word` the blanks `Word`, `a word`, `an word`, `A word` and `An word`."""
    blanks = dict(row)
    for column, words in row.items():
        with_article = ("an " if words[0].lower() in "aeiou" else "a ") + words
        blanks |= {_capital(column): _capital(words), f"a {column}": with_article, f"an {column}": with_article}
        blanks |= {f"A {column}": _capital(with_article), f"An {column}": _capital(with_article)}
    return blanks


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _read_toml(name: str) -> dict[str, dict]:
    return tomllib.loads((TABLES / f"{name}.toml").read_text(encoding="utf-8"))
