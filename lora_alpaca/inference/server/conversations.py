"""The messages of a request as a conversation for the adapter's template; what it cannot express is refused."""

from dataclasses import replace
from typing import Any

from lora_alpaca.data.formats.prompts import prompt_of
from lora_alpaca.data.formats.values import RowError
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.inference.server.bodies import ChatBody, ChatMessage
from lora_alpaca.prompts import AnyTemplate, Conversation
from lora_alpaca.prompts.jinja import with_input

_TEXTS = ("text", "input_text", "output_text")


def conversation_of(body: ChatBody, template: AnyTemplate, system: str, tools: list[dict[str, Any]]) -> Conversation:
    """Return the messages of a request with the tools that may be called; `system` counts where they name none.

    The content of the first question may hold an input, as a server is sent one that renders our chat template. Raises
    ApiError 400 for messages that are no conversation; whether the template can hold it is seen when it is
    rendered.
    """
    messages = [_as_row(message, number) for number, message in enumerate(body.messages)]
    if body.messages[-1].role == "assistant":
        raise ApiError(
            400,
            "messages: the last one is the assistant's; an answer that was begun cannot be continued here, so let the "
            "last message be the user's or a tool's",
            "messages",
        )
    if system and not any(message.role in ("system", "developer") for message in body.messages):
        messages.insert(0, {"role": "system", "content": system})
    try:
        found = prompt_of({"messages": messages} | ({"tools": tools} if tools else {}), where="messages")
    except RowError as error:
        raise ApiError(400, str(error).removeprefix("messages format: "), "messages") from None
    inputs = [message.input or "" for message in body.messages if message.role == "user"]
    if any(inputs[1:]):
        raise ApiError(400, "input belongs to the first question; put it into the content of a later one", "messages")
    if not inputs or not inputs[0]:
        return with_input(template, found)
    place = next(place for place, message in enumerate(found.messages) if message.role == "user")
    asked = replace(found.messages[place], input=inputs[0])
    return replace(found, messages=(*found.messages[:place], asked, *found.messages[place + 1 :]))


def _as_row(message: ChatMessage, number: int) -> dict[str, Any]:
    """Return a message as the data formats read one."""
    place = f"messages[{number}]"
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if isinstance(message.content, list):
        for position, part in enumerate(message.content):
            if part.type not in _TEXTS or part.text is None or part.model_extra:
                raise ApiError(
                    400, f"{place}.content[{position}] is of type {part.type[:40]!r}; only text is taken", "messages"
                )
        row["content"] = "".join(part.text or "" for part in message.content)
    for name, value in (message.model_extra or {}).items():
        if name not in ChatMessage.SILENT or value not in (None, "", [], {}):
            raise ApiError(400, f"{place}.{name[:80]}: not a field that has a meaning here", "messages")
    if message.tool_calls:
        row["tool_calls"] = message.tool_calls
    elif message.content is None:
        raise ApiError(400, f"{place}.content is missing", "messages")
    if message.reasoning_content:
        row["reasoning_content"] = message.reasoning_content
    if message.role == "tool":
        row |= {"tool_call_id": message.tool_call_id or "", "name": message.name or ""}
    return row
