"""Lists of turns to messages: roles under their many names, texts in parts, thoughts, calls, and what is learned."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_alpaca.data.formats import tools
from lora_alpaca.data.formats.fields import LEARNED, REASONING, Fields
from lora_alpaca.data.formats.values import RowError, content, parsed, short
from lora_alpaca.prompts import Message

_CALL = "function_call"  # ShareGPT's name of a turn that is a tool call
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", _CALL, "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "tool_response", "function_response"), "tool"),
}
_ROLE_OF = {"user": "a user", "assistant": "an assistant", "system": "a system", "tool": "a tool"}
_FOLLOWING = {  # which roles may follow, the expected one first
    None: ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def read(given: Any, field: str, rest: Fields) -> list[Message]:
    """Return the messages of a list of turns, or of a JSON text of one, in any order. Raises RowError."""
    turns = parsed(given, field)
    turns = [turns] if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{field} is {short(turns)}, and not a list of turns")
    return [_message(turn, f"{field}[{number}]", rest) for number, turn in enumerate(turns, start=1)]


def ordered(messages: Sequence[Message], field: str, rest: Fields) -> list[Message]:
    """Return the messages of a whole conversation with their tool calls matched.

    Raises RowError unless it is a system message or none, then user and assistant in turn, with the results of tools
    behind the calls, and an assistant message last.
    """
    before: Message | None = None
    for number, message in enumerate(messages, start=1):
        allowed = ("tool",) if before and before.calls else _FOLLOWING[before.role if before else None]
        if message.role not in allowed:
            after = f"after {_ROLE_OF[before.role]} turn" if before else "at the beginning"
            calling = " that calls" if before and before.calls else ""
            raise RowError(
                f"{field}[{number}]: {_ROLE_OF[message.role]} turn {after}{calling}; "
                f"{_ROLE_OF[allowed[0]]} turn belongs there"
            )
        before = message
    assert before is not None
    if before.role != "assistant":
        raise RowError(f"{field} ends with {_ROLE_OF[before.role]} turn, so there is no answer to learn")
    return tools.matched(messages, fresh_ids="tool_call_id" in rest.asked)


def is_answer(turn: Any) -> bool:
    """Return whether a turn is one of the assistant's, under whatever name."""
    name = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(name, str) and _ROLES.get(name.strip().lower()) == "assistant"


def _message(turn: Any, where: str, rest: Fields) -> Message:
    named = turn.keys() if isinstance(turn, dict) else set()
    is_sharegpt = "from" in named if {"from", "role"} & named else where.startswith("conversations")
    role_key, text_key = ("from", "value") if is_sharegpt else ("role", "content")
    if role_key not in named or not {text_key, "tool_calls", _CALL} & named:
        raise RowError(f"{where} is {short(turn)}, and not an object with {role_key} and {text_key}")
    name = turn[role_key].strip().lower() if isinstance(turn[role_key], str) else ""
    role = _ROLES.get(name)
    if role is None:
        known = "system, user, assistant or tool"
        if role_key == "from":
            known = "system, human, gpt, function_call or observation"
        raise RowError(f"{where}: {role_key} is {short(turn[role_key])}, and not {known}")
    used = [role_key, text_key, *LEARNED, *REASONING, "tool_calls", _CALL]
    rest.check(turn, used + ["tool_call_id", "name"] * (role == "tool"), where)
    turn = {key: value for key, value in turn.items() if key not in rest.asked}
    learned, thought = _is_learned(turn, role, where), reasoning(turn, where)
    if thought and role != "assistant":
        raise RowError(f"{where}: a thought in {_ROLE_OF[role]} turn; only an assistant thinks")
    if role == "tool":
        call_id, function = (turn.get(key) or "" for key in ("tool_call_id", "name"))
        said = tools.result(turn.get(text_key), f"{where}.{text_key}")
        return Message(role, said, call_id=content(call_id, f"{where}.tool_call_id"), name=str(function))
    calls = _calls(turn, name, text_key, where) if role == "assistant" else ()
    said = turn.get(text_key)
    is_call = name in (_CALL, "tool_call") or (calls and said is None)
    text = "" if is_call else content(said, f"{where}.{text_key}")
    return Message(role, text, learned=learned, reasoning=thought, calls=calls)


def _calls(turn: dict[str, Any], name: str, text_key: str, where: str) -> tuple[Any, ...]:
    """Return the tool calls of an assistant's turn: of OpenAI's two fields, or the text of ShareGPT's call."""
    if name in (_CALL, "tool_call"):
        return tools.calls(turn.get(text_key), f"{where}.{text_key}")
    found = ()
    for key in ("tool_calls", _CALL):
        if turn.get(key) not in (None, [], ""):
            found += tools.calls(turn[key], f"{where}.{key}")
    return found


def reasoning(turn: dict[str, Any], where: str = "") -> str:
    """Return the thought that a turn, or a row of one turn, gives in a field of its own; empty if there is none."""
    given = {key: turn[key] for key in REASONING if turn.get(key) not in (None, "", [])}
    if len({short(value) for value in given.values()}) > 1:
        raise RowError(f"{where + ': ' if where else ''}{' and '.join(given)} are two thoughts; leave one of them out")
    return next((content(value, f"{where + '.' if where else ''}{key}") for key, value in given.items()), "")


def _is_learned(turn: dict[str, Any], role: str, where: str) -> bool:
    """Return whether an answer is to be learned. RowError for a weight besides 1 and 0, and for one of a question."""
    learned = True
    for key in LEARNED:
        value = turn.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowError(f"{where}: {key} is {short(value)}; it can be 1 (learned) or 0 (only seen)")
        if value and role != "assistant":
            raise RowError(
                f"{where}: {key} is {short(value)} in {_ROLE_OF[role]} turn, and only answers are learned; "
                "--train_on_inputs learns all of the row"
            )
        learned = learned and bool(value)
    return learned


def only_seen(messages: Sequence[Message]) -> list[Message]:
    """Return messages of which no answer is learned."""
    return [replace(message, learned=False) if message.role == "assistant" else message for message in messages]
