"""Five formats of rows, recognised by their fields: Alpaca, ShareGPT, messages, prompt/completion and text."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_alpaca.data.formats import tools, turns
from lora_alpaca.data.formats.fields import REASONING, REJECTED, VERDICTS, Fields
from lora_alpaca.data.formats.values import Rejected, RowError, parsed, short, text
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation, Message


@dataclass(frozen=True)
class Format:
    """A kind of row: its name in messages, the fields it must and may have, and how it becomes messages."""

    name: str
    fields: tuple[str, ...]
    optional: tuple[str, ...]
    messages: Callable[[dict[str, Any], Fields], list[Message]]


def _alpaca(row: dict[str, Any], rest: Fields) -> list[Message]:
    instruction, output = text(row["instruction"], "instruction"), text(row["output"], "output")
    given = row.get("input")
    user = Message("user", instruction, "" if given is None else text(given, "input"))
    answer = Message("assistant", output, reasoning=turns.reasoning(row))
    return [*_system(row), *_history(row.get("history")), user, answer]


def _history(given: Any) -> list[Message]:
    """Return the earlier turns of an Alpaca row, [[question, answer], ...]."""
    pairs = parsed(given, "history")
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError(f"history is {short(pairs)}, and not a list of [question, answer] pairs")
    return [
        message
        for number, (question, answer) in enumerate(pairs, start=1)
        for message in (
            Message("user", text(question, f"history[{number}][1]")),
            Message("assistant", text(answer, f"history[{number}][2]")),
        )
    ]


def _completion(row: dict[str, Any], rest: Fields) -> list[Message]:
    prompt, answer = text(row["prompt"], "prompt"), text(row["completion"], "completion")
    return [*_system(row), Message("user", prompt), Message("assistant", answer, reasoning=turns.reasoning(row))]


def _exchange(row: dict[str, Any], rest: Fields) -> list[Message]:
    """Return the conversation of two lists of messages, as TRL has them; of the prompt, answers are only seen."""
    prompt, completion = (
        turns.read(value, key, rest) if isinstance(value, (list, dict)) else [Message(role, text(value, key))]
        for key, role, value in (
            ("prompt", "user", row["prompt"]),
            ("completion", "assistant", row["completion"]),
        )
    )
    if thought := turns.reasoning(row):
        completion[-1] = replace(completion[-1], reasoning=thought)
    messages = [*_system(row), *turns.only_seen(prompt), *completion]
    return turns.ordered(messages, "prompt and completion", rest)


def _document(row: dict[str, Any], rest: Fields) -> list[Message]:
    return [Message("assistant", text(row["text"], "text"))]


def _sharegpt(row: dict[str, Any], rest: Fields) -> list[Message]:
    return _conversation(row, "conversations", rest)


def _messages(row: dict[str, Any], rest: Fields) -> list[Message]:
    return _conversation(row, "messages", rest)


def _conversation(row: dict[str, Any], field: str, rest: Fields) -> list[Message]:
    system, messages = _system(row), turns.read(row[field], field, rest)
    if system and messages[0].role == "system":
        raise RowError(f"system and {field}[1] are both system messages; leave one of them out")
    return system + turns.ordered(messages, field, rest)


def _system(row: dict[str, Any]) -> list[Message]:
    system = row.get("system")
    return [] if system in (None, "") else [Message("system", text(system, "system"))]


FORMATS = (
    Format("Alpaca", ("instruction", "output"), ("input", "system", "history", "tools", *REASONING), _alpaca),
    Format("ShareGPT", ("conversations",), ("system", "tools"), _sharegpt),
    Format("messages", ("messages",), ("system", "tools"), _messages),
    Format("prompt/completion", ("prompt", "completion"), ("system", "tools", *REASONING), _completion),
    Format("text", ("text",), (), _document),
)
_EXCHANGE = Format("messages", ("prompt", "completion"), ("system", "tools", *REASONING), _exchange)
FIELDS = sorted({field for kind in FORMATS for field in kind.fields + kind.optional})
EXPECTED = "instruction and output, conversations, messages, prompt and completion, or text"


def recognise(row: Any) -> Format:
    """Return the format of a row by its fields. RowError, with the nearest name, for a row of none."""
    row = _as_object(row)
    for kind in FORMATS:
        if row.keys() >= set(kind.fields):
            in_lists = any(isinstance(row[field], (list, dict)) for field in kind.fields)
            return _EXCHANGE if in_lists and kind.messages is _completion else kind
    if {"chosen", "rejected"} <= row.keys():
        raise RowError(_preference(row))
    if row.keys() >= {"role", "content"} or row.keys() >= {"from", "value"}:
        raise RowError(
            'one message, and a row is a whole conversation: all of it on one line, {"messages": [{"role": ..., '
            '"content": ...}, ...]}'
        )
    partly = next((kind for kind in FORMATS if row.keys() & set(kind.fields)), None)
    if partly:
        missing = next(field for field in partly.fields if field not in row)
        raise RowError(f"{partly.name} format: no {missing}; {_keys(row)}{_hint(missing, row)}")
    meant = next((field for field in FIELDS if difflib.get_close_matches(field, map(str, row), n=1, cutoff=0.8)), None)
    raise RowError(
        f"{_keys(row)}" + (_hint(meant, row) if meant else f"; expected {EXPECTED}; --columns maps other names")
    )


def _as_object(row: Any) -> dict[str, Any]:
    """Return a row as an object; a bare list of messages is a conversation."""
    if isinstance(row, list) and row and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in row):
        return {"messages": row}
    if not isinstance(row, dict):
        raise RowError(f"a row is an object with {EXPECTED}, not {short(row)}")
    return row


def _preference(row: dict[str, Any]) -> str:
    """Return what to do about a row of a preference pair."""
    chosen = row["chosen"]
    first = chosen[0] if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict) else {}
    if {"instruction", "prompt"} & row.keys() and first.get("role", "assistant") == "assistant":
        field = "output" if "instruction" in row else "completion"
    elif isinstance(chosen, list):
        field = "messages"
    else:
        field = "text"
    return (
        "chosen and rejected are a preference pair, which is not trained on; "
        f"--columns {field}=chosen trains on the good answers alone"
    )


def _keys(row: dict[str, Any]) -> str:
    return f"the row has {', '.join(map(repr, row)) or 'no fields'}"[:200]


def _hint(field: str, row: dict[str, Any]) -> str:
    near = difflib.get_close_matches(field, map(str, row), n=1, cutoff=0.6)
    if not near:
        return f"; --columns {field}=NAME names the one that holds it"
    return f"; did you mean {field} by {near[0]!r}? --columns {field}={near[0] if near[0].isprintable() else 'NAME'}"


def conversation(row: Any, kind: Format, where: str, rest: Fields) -> Conversation:
    """Return a row of a known format as a conversation; what `rest` is told of its other fields.

    Raises RowError, with the format's name, for a row that is not so, and Rejected for one that is marked as bad.
    """
    row = _as_object(row)
    for field in kind.fields:
        if field not in row:
            raise RowError(f"{kind.name} format: no {field}; {_keys(row)}{_hint(field, row)}")
    for name in VERDICTS:
        if row.get(name) is False or row.get(name) in ("false", "False"):
            raise Rejected(f"{name} is false: the row is marked as a bad answer")
    if row.get("rejected") and row.get("chosen"):
        raise RowError(_preference(row))
    try:
        rest.check(row, kind.fields + kind.optional)
        row = {key: value for key, value in row.items() if key in kind.fields or key not in rest.asked}
        return Conversation(tuple(kind.messages(row, rest)), where, tools.definitions(row.get("tools"), "tools"))
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
    """Return a row under our field names; what `columns` does not name keeps its own, but for settled rejected ones."""
    if not columns or not isinstance(row, dict):
        return row
    if "chosen" in columns.values():
        row = {key: value for key, value in row.items() if key not in REJECTED}
    taken = set(columns.values())
    rest = {key: value for key, value in row.items() if key not in taken and key not in columns}
    return rest | {field: row[column] for field, column in columns.items() if column in row}
