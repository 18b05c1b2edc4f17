"""docs/data.md has a table of every form of row; each example is read, and becomes what the table says."""

import re
from pathlib import Path

import pytest

from lora_alpaca.data import Rows
from lora_alpaca.prompts import Message

PAGE = (Path(__file__).parent.parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
FORMS = re.findall(r"^\| ([^|]+) \| `([\[{].*[\]}])` \| ([^|`]+) \|$", PAGE, re.MULTILINE)


def described(message: Message) -> str:
    """Return a message as the table writes it."""
    name = "call" if message.calls else message.role
    name = f"(thought) {name}" if message.reasoning else name
    return name if message.learned else f"[{name}]"


def test_the_table_is_found():
    assert len(FORMS) == len(re.findall(r"^\| [^|]+ \| `[\[{]", PAGE, re.MULTILINE)) > 15


@pytest.mark.parametrize(("form", "row", "becomes"), FORMS, ids=[form for form, _, _ in FORMS])
def test_an_example_is_read_as_the_table_says(tmp_path, form, row, becomes):
    path = tmp_path / "rows.json"
    path.write_text(row, encoding="utf-8")
    rows = Rows(str(path))
    (conversation,) = rows
    turns = ", ".join(map(described, conversation.messages))
    assert ("tools; " if conversation.tools else "") + turns == becomes
    assert rows.fields.lines() == []
