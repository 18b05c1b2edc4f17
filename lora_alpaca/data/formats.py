"""What a raw row means: five formats, recognised by their fields, checked, and made into conversations."""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation, Message

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_ROLE_OF = {"user": "a user", "assistant": "an assistant", "system": "a system"}


@dataclass(frozen=True)
class Format:
    """A kind of row: its name in messages, the fields it must and may have, and how it becomes messages."""

    name: str
    fields: tuple[str, ...]
    optional: tuple[str, ...]
    messages: Callable[[dict[str, Any]], list[Message]]


class RowError(ValueError):
    """A row is malformed; the message says how."""


def _alpaca(row: dict[str, Any]) -> list[Message]:
    instruction, output = text(row["instruction"], "instruction"), text(row["output"], "output")
    given = row.get("input")
    user = Message("user", instruction, "" if given is None else text(given, "input"))
    return [*_system(row), user, Message("assistant", output)]


def _completion(row: dict[str, Any]) -> list[Message]:
    return [Message("user", text(row["prompt"], "prompt")), Message("assistant", text(row["completion"], "completion"))]


def _document(row: dict[str, Any]) -> list[Message]:
    return [Message("assistant", text(row["text"], "text"))]


def _sharegpt(row: dict[str, Any]) -> list[Message]:
    system, turns = _system(row), _turns(row["conversations"], "conversations", "from", "value")
    if system and turns[0].role == "system":
        raise RowError("system and conversations[1] are both system messages; leave one of them out")
    return system + turns


def _messages(row: dict[str, Any]) -> list[Message]:
    return _turns(row["messages"], "messages", "role", "content")


def _system(row: dict[str, Any]) -> list[Message]:
    system = row.get("system")
    return [] if system in (None, "") else [Message("system", text(system, "system"))]


def _turns(turns: Any, field: str, role_key: str, text_key: str) -> list[Message]:
    """Return the messages of a list of turns: a system message or none, then user and assistant in turn."""
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{field} is {_short(turns)}, and not a list of turns")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        where = f"{field}[{number}]"
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise RowError(f"{where} is {_short(turn)}, and not an object with {role_key} and {text_key}")
        role = _ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            known = "system, user or assistant" if role_key == "role" else "system, human or gpt"
            raise RowError(f"{where}: {role_key} is {_short(turn[role_key])}, and not {known}")
        before = messages[-1].role if messages else None
        expected = "user" if before in ("system", "assistant") else "assistant" if before == "user" else None
        if (expected and role != expected) or (not expected and role == "assistant"):
            after = f"after {_ROLE_OF[before]} turn" if before else "at the beginning"
            raise RowError(f"{where}: {_ROLE_OF[role]} turn {after}; {_ROLE_OF[expected or 'user']} turn belongs there")
        messages.append(Message(role, text(turn[text_key], f"{where}.{text_key}")))
    if messages[-1].role != "assistant":
        raise RowError(f"{field} ends with {_ROLE_OF[messages[-1].role]} turn, so there is no answer to learn")
    return messages


FORMATS = (
    Format("Alpaca", ("instruction", "output"), ("input", "system"), _alpaca),
    Format("ShareGPT", ("conversations",), ("system",), _sharegpt),
    Format("messages", ("messages",), (), _messages),
    Format("prompt/completion", ("prompt", "completion"), (), _completion),
    Format("text", ("text",), (), _document),
)
FIELDS = sorted({field for kind in FORMATS for field in kind.fields + kind.optional})
EXPECTED = "instruction and output, conversations, messages, prompt and completion, or text"


def text(value: Any, field: str) -> str:
    """Return a value that is a text; RowError if it is none, or one that no tokenizer can encode."""
    if not isinstance(value, str):
        raise RowError(f"{field} is {_short(value)}, which is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{field} holds half of a surrogate pair, which no tokenizer can encode") from None
    return value


def _short(value: Any) -> str:
    try:
        return json.dumps(value, default=str)[:40]
    except (TypeError, ValueError, RecursionError):
        return f"a {type(value).__name__}"


def recognise(row: Any) -> Format:
    """Return the format of a row by its fields. RowError, with the nearest name, for a row of none."""
    if not isinstance(row, dict):
        raise RowError(f"a row is an object with {EXPECTED}, not {_short(row)}")
    for kind in FORMATS:
        if row.keys() >= set(kind.fields):
            return kind
    partly = next((kind for kind in FORMATS if row.keys() & set(kind.fields)), None)
    if partly:
        missing = next(field for field in partly.fields if field not in row)
        raise RowError(f"{partly.name} format: no {missing}; {_keys(row)}{_hint(missing, row)}")
    meant = next((field for field in FIELDS if difflib.get_close_matches(field, map(str, row), n=1, cutoff=0.8)), None)
    raise RowError(
        f"{_keys(row)}" + (_hint(meant, row) if meant else f"; expected {EXPECTED}; --columns maps other names")
    )


def _keys(row: dict[str, Any]) -> str:
    return f"the row has {', '.join(map(repr, row)) or 'no fields'}"[:200]


def _hint(field: str, row: dict[str, Any]) -> str:
    near = difflib.get_close_matches(field, map(str, row), n=1, cutoff=0.6)
    if not near:
        return f"; --columns {field}=NAME names the one that holds it"
    return f"; did you mean {field} by {near[0]!r}? --columns {field}={near[0] if near[0].isprintable() else 'NAME'}"


def conversation(row: Any, kind: Format, where: str) -> Conversation:
    """Return a row of a known format as a conversation; RowError, with the format's name, for one that is not so."""
    if not isinstance(row, dict):
        raise RowError(f"a row is an object with {EXPECTED}, not {_short(row)}")
    for field in kind.fields:
        if field not in row:
            raise RowError(f"{kind.name} format: no {field}; {_keys(row)}{_hint(field, row)}")
    try:
        return Conversation(tuple(kind.messages(row)), where)
    except RowError as error:
        raise RowError(f"{kind.name} format: {error}") from None


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """Return {our field: its name in the data} of `instruction=question` pairs; DataError for an unknown field."""
    columns: dict[str, str] = {}
    for pair in pairs:
        field, equals, column = pair.partition("=")
        if not equals or not column or field not in FIELDS:
            known = ", ".join(FIELDS)
            raise DataError(f"--columns {pair}: FIELD=COLUMN pairs are expected, and the fields are {known}")
        if field in columns:
            raise DataError(f"--columns {pair}: {field} is named twice, as {columns[field]} before; once is enough")
        columns[field] = column
    return columns


def renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """Return a row under our field names; what `columns` does not name keeps its own."""
    if not columns or not isinstance(row, dict):
        return row
    taken = set(columns.values())
    rest = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return rest | {field: row[column] for field, column in columns.items() if column in row}
