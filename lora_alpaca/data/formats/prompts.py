"""The prompt of a row that need not have an answer: to be answered, and not to be learned."""

from typing import Any

from lora_alpaca.data.formats import kinds
from lora_alpaca.data.formats.fields import Fields
from lora_alpaca.data.formats.turns import is_answer
from lora_alpaca.data.formats.values import RowError, parsed
from lora_alpaca.prompts import Conversation, Message

_ANSWERS = {"instruction": "output", "prompt": "completion"}  # field of a question -> field of its answer
_LISTS = ("messages", "conversations")
_STAND_IN = "."  # an answer where a row has none; it is left out again


def prompt_of(row: Any, where: str = "", rest: Fields | None = None) -> Conversation:
    """Return what comes before the last answer of a row, or all of one that has no answer. Raises RowError."""
    return question_of(row, where, rest)[0]


def question_of(row: Any, where: str = "", rest: Fields | None = None) -> tuple[Conversation, Message | None]:
    """Return what comes before the last answer of a row, and that answer if there is one. Raises RowError."""
    row = {"messages": row} if isinstance(row, list) else row
    whole = _with_answer(row) if isinstance(row, dict) else row
    conversation = kinds.conversation(whole, kinds.recognise(whole), where, rest or Fields())
    if conversation.is_document:
        raise RowError("text format: a document has no question to answer")
    if conversation.prompt.messages[-1].is_blank:
        raise RowError("the question is empty, so there is nothing to answer")
    return conversation.prompt, conversation.messages[-1] if whole is row else None


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with an answer at its end."""
    for question, answer in _ANSWERS.items():
        if question in row and row.get(answer) in (None, ""):
            return row | {answer: _STAND_IN}
    for name in _LISTS:
        turns = parsed(row[name], name) if name in row else None
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            keys = ("from", "value") if "from" in turns[-1] else ("role", "content")
            return (
                row
                if is_answer(turns[-1])
                else row | {name: [*turns, dict(zip(keys, ("assistant", _STAND_IN), strict=True))]}
            )
    return row
