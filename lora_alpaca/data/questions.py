"""The rows of a file as questions to be answered, each with the answer that it has, if it has one.

A row that cannot be asked is a question too, with the reason, so that every row keeps its number.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from lora_alpaca.data import formats
from lora_alpaca.data.formats import Fields, RowError
from lora_alpaca.data.formats.prompts import question_of
from lora_alpaca.data.readers.json_rows import Bad
from lora_alpaca.data.readers.sources import open_sources
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation, Message
from lora_alpaca.prompts.conversation import as_text


class Question(NamedTuple):
    """A row by its number, from 1, and where it stands: what to ask, or why it cannot be asked."""

    number: int
    where: str
    conversation: Conversation | None
    answer: Message | None = None
    reason: str = ""
    id: str | int | None = None  # the row's own

    @property
    def expected(self) -> str | None:
        """Return the text of the row's answer, its tool calls as JSON."""
        if self.answer is None or self.answer.text or not self.answer.calls:
            return None if self.answer is None else self.answer.text
        return "\n".join(map(as_text, self.answer.calls))


class Questions(Iterable[Question]):
    """The rows behind `--data_path` in their order, read once when this is made, and anew in every iteration.

    `digest` is a sha256 of all that they hold. Raises DataError where none of them can be asked, or for a file that
    cannot be read.
    """

    def __init__(self, data_path: str, columns: list[str] | None = None, ignore_fields: list[str] | None = None):
        self.data_path = data_path
        self.fields = Fields(ignore_fields or ())
        self._columns = formats.parse_columns(columns or [])
        self.sources, self._found = open_sources(data_path)
        self._number, first_reason, asked = 0, "", 0
        digest = hashlib.sha256()
        for question, row in self._read():
            self._number += 1
            asked += not question.reason
            first_reason = first_reason or question.reason
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        self.digest = digest.hexdigest()
        if not asked:
            raise DataError(first_reason or f"{data_path}: contains 0 rows")

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Question]:
        """Yield the questions; DataError where there are more or fewer than before."""
        number = 0
        for question, _ in self._read():
            number = question.number
            if number > len(self):
                break
            yield question
        if number != len(self):
            raise DataError(f"{self.data_path}: {len(self)} rows, and now another number; it is being written")

    @property
    def notes(self) -> list[str]:
        """Return lines on what the rows were read from, and on fields that went unused."""
        notes = [*self._found, *(note for source in self.sources for note in source.notes)]
        return [*notes, *(line for line in self.fields.lines() if line.startswith("warning"))]

    def _read(self) -> Iterator[tuple[Question, Any]]:
        """Yield the questions with the raw rows that they were made of."""
        number = 0
        for source in self.sources:
            for line, row in source.read():
                number += 1
                where = f"{source.name}:{line}"
                yield self._question(number, where, row), row.reason if isinstance(row, Bad) else row

    def _question(self, number: int, where: str, row: Any) -> Question:
        own_id = row.get("id") if isinstance(row, dict) and isinstance(row.get("id"), (str, int)) else None
        try:
            if isinstance(row, Bad):
                raise RowError(row.reason)
            conversation, answer = question_of(formats.renamed(row, self._columns), where, self.fields)
        except RowError as error:
            return Question(number, where, None, None, f"{where}: {error}", own_id)
        return Question(number, where, conversation, answer, "", own_id)


def prompt_text(conversation: Conversation | None) -> str:
    """Return what was asked as people read it: an instruction and its input, or all turns with their roles."""
    if conversation is None:
        return ""
    texts = [(message.role, "\n\n".join(message.texts())) for message in conversation.messages]
    return texts[0][1] if len(texts) == 1 else "\n\n".join(f"{role}: {text}" for role, text in texts)
