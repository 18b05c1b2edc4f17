"""The values of fields: texts, texts in parts, JSON in texts, each with an error that says what is there instead."""

import json
from typing import Any


class RowError(ValueError):
    """A row is malformed; the message says how."""


class Rejected(RowError):
    """A row whose answer is marked as bad. It is never learned, and never left out without a word."""


def text(value: Any, field: str) -> str:
    """Return a value that is a text; RowError if it is none, or one that no tokenizer can encode."""
    if not isinstance(value, str):
        raise RowError(f"{field} is {short(value)}, which is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{field} holds half of a surrogate pair, which no tokenizer can encode") from None
    return value


def content(value: Any, field: str) -> str:
    """Return a text, or the texts of a list of parts put together; RowError for a part of another type."""
    if not isinstance(value, list) or not value:
        return text(value, field)
    return "".join(_part(part, f"{field}[{number}]") for number, part in enumerate(value, start=1))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return text(part, where)
    if not isinstance(part, dict):
        raise RowError(f"{where} is {short(part)}, and not a part of a content, such as a text")
    kind = part.get("type", "text" if "text" in part else None)
    if kind not in ("text", "input_text", "output_text"):
        raise RowError(f"{where} is a part of type {short(kind)}, and only text is trained on")
    return text(part.get("text"), f"{where}.text")


def parsed(value: Any, field: str) -> Any:
    """Return what a text that contains a JSON list or object contains, and any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise RowError(f"{field} is a text that begins like JSON and is none ({reason})") from None


def short(value: Any) -> str:
    """Return a value as JSON, cut short for a message."""
    try:
        return json.dumps(value, default=str)[:40]
    except (TypeError, ValueError, RecursionError):
        return f"a {type(value).__name__}"
