"""Control tokens that a row's texts hold, out of the way while a chat template renders the row.

A rendered text does not tell the template's control tokens from those that somebody typed, in a message, a call, a
result or a definition. Typed ones get stand-ins that no text holds, and their places back afterwards.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lora_alpaca.prompts.conversation import Conversation


class Escape:
    """A conversation with stand-ins for the control tokens that its texts hold, and the way back.

    `found` is whether there are any.
    """

    def __init__(self, conversation: Conversation, control: re.Pattern[str]):
        texts = list(conversation.texts())
        self._tokens = sorted({token for text in texts for token in control.findall(text)})
        self.found = bool(self._tokens)
        self._mark = "qC"
        while any(self._mark in text for text in texts):
            self._mark += "q"
        self.conversation = conversation
        if self.found:
            stand_in = {token: f"{self._mark}{number}Xq" for number, token in enumerate(self._tokens)}
            self.conversation = _mapped(conversation, lambda text: control.sub(lambda token: stand_in[token[0]], text))

    def undo(self, text: str) -> str:
        """Return a text with the control tokens of the row in their places again."""
        return re.sub(rf"{self._mark}(\d+)Xq", lambda found: self._tokens[int(found[1])], text) if self.found else text


def _mapped(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """Return a conversation with every text in it changed."""

    def mapped(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {change(key): mapped(part) for key, part in value.items()}
        return [mapped(part) for part in value] if isinstance(value, list) else value

    messages = tuple(
        replace(
            message,
            text=change(message.text),
            input=change(message.input),
            reasoning=change(message.reasoning),
            calls=tuple(map(mapped, message.calls)),
        )
        for message in conversation.messages
    )
    return replace(conversation, messages=messages, tools=tuple(map(mapped, conversation.tools)))
