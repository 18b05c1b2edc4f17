"""Whatever rows say is text in a report: on the page, and in Markdown."""

import pytest
from hostile_texts import HOSTILE, Elements

from lora_alpaca.errors import visible
from lora_alpaca.training.report.document import (
    MARK,
    Cards,
    Code,
    Heading,
    Paragraph,
    Plot,
    Sample,
    Table,
    as_markdown,
    as_page,
)


def blocks(text):
    return [
        Heading(text),
        Paragraph(text),
        Code(text),
        Cards([(text, text)]),
        Table([text, text], [[text, text]], frozenset({1})),
        Sample(text, text, [(text, text, text)]),
        Plot(text, "<svg></svg>"),
    ]


def outside(text):
    """Return the lines of a Markdown text that are in no block of code; every block must end."""
    found, fence = [], ""
    for line in text.splitlines():
        if fence:
            fence = "" if line == fence else fence
        elif line.startswith("```"):
            fence = line.removesuffix("text")
        else:
            found.append(line)
    assert not fence, "a block of code does not end"
    return found


def test_thirty_hostile_strings_are_text_on_the_page():
    assert len(set(HOSTILE)) == 30
    plain = Elements(as_page("text", blocks("text")))
    for text in HOSTILE:
        found = Elements(as_page(text, blocks(text)))
        assert (found.tags, found.attributes) == (plain.tags, plain.attributes), text
        assert found.texts.count(visible(text)) == plain.texts.count("text") > 10, text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_string_is_text_in_markdown(text):
    found, plain = as_markdown(text, blocks(text)), as_markdown("text", blocks("text"))
    lines = outside(found)
    assert len(lines) == len(outside(plain)), "the text made lines of its own"
    assert [line.count("|") - line.count("\\|") for line in lines] == [line.count("|") for line in outside(plain)]
    bare = "".join(line for line in lines if line != MARK)
    assert "<" not in bare
    assert "](" not in bare.replace("\\]", "")
    assert visible(found) == found
