"""Tools in rows: definitions, calls and results, in OpenAI's form and in ShareGPT's, as chat templates take them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_alpaca.data.formats.values import RowError, content, parsed, short, text
from lora_alpaca.prompts import Message


def definitions(value: Any, field: str) -> tuple[Any, ...]:
    """Return tool definitions, `{"type": "function", "function": {"name": ...}}` each, of a list or a JSON text."""
    given = parsed(value, field)
    if not given:
        return ()
    given = [given] if isinstance(given, dict) else given
    if not isinstance(given, list):
        raise RowError(f"{field} is {short(given)}, and not a list of tool definitions")
    tools = []
    for number, tool in enumerate(given, start=1):
        tool = parsed(tool, f"{field}[{number}]")
        tool = tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool}
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{field}[{number}] is {short(function)}, and not a function with a name")
        tools.append({"type": "function"} | tool)
    return tuple(tools)


def calls(value: Any, where: str) -> tuple[Any, ...]:
    """Return tool calls, of a list, one call, or a JSON text of either. An id that is missing is left empty."""
    given = parsed(value, where)
    given = [given] if isinstance(given, dict) else given
    if not isinstance(given, list) or not given:
        raise RowError(f"{where} is {short(given)}, and not a list of tool calls")
    return tuple(_call(parsed(call, where), f"{where}[{number}]") for number, call in enumerate(given, start=1))


def _call(call: Any, where: str) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{where} is {short(call)}, and not a call with a name and arguments")
    arguments = parsed(function.get("arguments", function.get("parameters", {})), f"{where}.arguments")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"{where}.arguments is {short(arguments)}, and not a JSON object")
    number = call.get("id") or ""
    name = text(function["name"], f"{where}.name")
    text(json.dumps(arguments, ensure_ascii=False), f"{where}.arguments")
    return {
        "id": text(number, f"{where}.id"),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def result(value: Any, field: str) -> str:
    """Return what a tool gave back as a text; an object is written as JSON."""
    if isinstance(value, dict) or (isinstance(value, list) and not _is_parts(value)):
        return text(json.dumps(value, ensure_ascii=False), field)
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return content(value, field)


def _is_parts(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(part, dict) and "type" in part for part in value)


def matched(messages: Sequence[Message], fresh_ids: bool = False) -> list[Message]:
    """Return messages whose calls all have an id, and whose results have the id and name of their calls.

    An id that is missing, or every one with `fresh_ids`, is `call00001`, `call00002`, ...: nine letters and digits, as
    Mistral's templates want them. Raises RowError for a result of a call that was never made.
    """
    done: list[Message] = []
    made = 0
    waiting: list[tuple[str, str, str]] = []  # given id, id and name of the calls without a result yet
    for place, message in enumerate(messages, start=1):
        if message.calls:
            waiting = []
            numbered = []
            for call in message.calls:
                made += 1
                number = f"call{made:05}" if fresh_ids or not call["id"] else call["id"]
                waiting.append((call["id"], number, call["function"]["name"]))
                numbered.append(call | {"id": number})
            message = replace(message, calls=tuple(numbered))
        elif message.role == "tool" and waiting:
            own = [one for one in waiting if message.call_id and one[0] == message.call_id]
            if message.call_id and not own and all(one[0] for one in waiting):
                raise RowError(f"turn {place} is the result of {short(message.call_id)}, a call that was not made")
            found = (own or waiting)[0]
            waiting.remove(found)
            message = replace(message, call_id=found[1], name=message.name or found[2])
        done.append(message)
    return done
