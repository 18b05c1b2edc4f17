"""The tokenizer's own chat template (Jinja), rendered, and which of the tokenizer's tokens are control tokens."""

import datetime
import json
import re
from dataclasses import replace
from functools import cached_property
from typing import Any

from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts.conversation import Conversation, Message
from lora_alpaca.prompts.time_limit import time_limit

SECONDS = 10  # that a template may take for one conversation
TOOLS, CALLS, RESULTS, THOUGHTS = "tool definitions", "tool calls", "tool results", "thoughts (reasoning_content)"


class Rendering:
    """A chat template with its tokenizer. `source` is its text, or texts by the names `default` and `tool_use`."""

    def __init__(self, source: str | dict[str, str], tokenizer: Any):
        self.source, self._tokenizer = source, tokenizer

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Return a pattern of the tokenizer's control tokens, with a group around it."""
        tokens = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)") + ")")

    @cached_property
    def shown(self) -> set[str]:
        """Return what the template shows besides plain texts: tool definitions, calls, results, thoughts."""
        tool = {"name": "qXtool", "description": "qXsays", "parameters": {"type": "object", "properties": {}}}
        function = {"type": "function", "function": tool}
        user, answer = Message("user", "a"), Message("assistant", "b")
        call = {"id": "qXcall000", "type": "function", "function": {"name": "qXcalled", "arguments": {"a": "b"}}}
        calling = Message("assistant", "", calls=(call,))
        result = Message("tool", "qXresult", call_id="qXcall000", name="qXcalled")
        probes = {
            TOOLS: ("qXtool", (user, answer), (function,)),
            CALLS: ("qXcalled", (user, calling), (function,)),
            RESULTS: ("qXresult", (user, calling, result, answer), (function,)),
            THOUGHTS: ("qXthought", (user, replace(answer, reasoning="qXthought")), ()),
        }
        shown = set()
        for what, (mark, messages, tools) in probes.items():
            try:
                if mark in self.render(Conversation(messages, tools=tools)):
                    shown.add(what)
            except TemplateError:
                shown.add(what)  # whatever it refuses here, it refuses of a row too, for its own reason
        return shown

    def render(self, conversation: Conversation) -> str:
        """Return the text that transformers renders; that of a prompt if the conversation ends without an answer."""
        where = conversation.where
        source, tools = self.source, list(conversation.tools) or None
        if isinstance(source, dict):
            source = source["tool_use" if tools and "tool_use" in source else "default"]
        try:
            with time_limit(SECONDS):
                text = self._tokenizer.apply_chat_template(
                    [as_chat(message) for message in conversation.messages],
                    tools=tools,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=conversation.messages[-1].role != "assistant",
                )
        except TimeoutError:
            raise TemplateError(
                f"{where}{': ' if where else ''}the chat template takes more than {SECONDS} s for one conversation; "
                "use vicuna or chatml"
            ) from None
        except Exception as error:  # Jinja's, and whatever a template raises by its own choice
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TemplateError(f"{where}{': ' if where else ''}the chat template refuses: {reason}") from None
        return str(text)


def chosen(found: Any) -> str | dict[str, str]:
    """Return the chat template of a tokenizer, with the one for tools if it brings both; TemplateError for others."""
    if isinstance(found, dict) and isinstance(found.get("default"), str):
        both = {name: found[name] for name in ("default", "tool_use") if isinstance(found.get(name), str)}
        return both if len(both) > 1 else both["default"]
    if not isinstance(found, str):
        raise TemplateError(
            "template chat: the tokenizer brings no chat template" if not found else
            "template chat: the tokenizer brings several chat templates; save it with the one to use"
        )  # fmt: skip
    return found


def dated(source: str | dict[str, str]) -> str | dict[str, str]:
    """Return a template that tells the model today's date with that date written out: tomorrow's prompt is the same."""
    if isinstance(source, dict):
        return {name: str(dated(text)) for name, text in source.items()}
    today = datetime.date.today()
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: json.dumps(today.strftime(call[2])), source)


def as_chat(message: Message) -> dict[str, Any]:
    """Return a message as chat templates take it."""
    chat: dict[str, Any] = {"role": message.role, "content": text_of(message)}
    if message.reasoning:
        chat["reasoning_content"] = message.reasoning
    if message.calls:
        chat["tool_calls"] = list(message.calls)
    if message.call_id:
        chat["tool_call_id"] = message.call_id
    if message.name:
        chat["name"] = message.name
    return chat


def text_of(message: Message) -> str:
    """Return what a message says, the input below the instruction."""
    return f"{message.text}\n\n{message.input}" if message.input else message.text
