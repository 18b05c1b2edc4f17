"""Tool calls in the text of an answer: their form, which is learned from the template, found and read.

A template is asked how it writes a call that it never saw. Around the JSON of a call may be marks (`<tool_call>`,
`[TOOL_CALLS]`), or nothing. A template that writes calls otherwise than as JSON has no form here: its calls stay text.
"""

import json
import re
import secrets
from collections.abc import Collection
from typing import Any

from lora_alpaca.errors import TemplateError
from lora_alpaca.inference.codec import Codec, StopTexts
from lora_alpaca.prompts import ChatTemplate, Conversation, Fragment, Message

_NAME, _ARGUMENTS = "qXname", {"qXkey": "qXvalue"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "qXsays",
        "parameters": {"type": "object", "properties": {"qXkey": {"type": "string", "description": "qXis"}}},
    },
}
_CALL = {"id": "qXcall000", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
_CALLING, _SAID = Message("assistant", "", calls=(_CALL,)), "qXsaid"
_START = re.compile(r"[\[{]")


class ToolForm:
    """How a template writes calls: `opening`, JSON, `closing`. In the JSON, the keys of a call's name and arguments.

    `in_list` says that the JSON is a list of calls, `pieces` are opening and closing with their control tokens.
    """

    def __init__(self, before: list[Fragment], value: Any, after: list[Fragment]):
        self.before, self.after, self.in_list = before, after, isinstance(value, list)
        self.opening, self.closing = ("".join(one.text for one in part).strip() for part in (before, after))
        [self.call] = value if self.in_list else [value]
        self.name_key = next(key for key, inner in self.call.items() if inner == _NAME)
        self.arguments_key = next(key for key, inner in self.call.items() if inner in (_ARGUMENTS, _DUMPED))

    def control_ids(self, codec: Codec) -> set[int]:
        """Return the ids of the control tokens that are marks of calls."""
        marks = {fragment.text for fragment in (*self.before, *self.after) if fragment.control}
        return {codec.tokenizer.convert_tokens_to_ids(mark) for mark in marks}

    def read(self, text: str, names: Collection[str]) -> list[dict[str, str]] | None:
        """Return the calls that a text consists of, None if it is anything else, or calls what there is not."""
        calls: list[Any] = []
        rest = text.strip()
        while rest:
            if not rest.startswith(self.opening):
                return None
            rest = rest.removeprefix(self.opening).lstrip()
            try:
                value, end = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError):
                return None
            calls += value if isinstance(value, list) else [value]
            rest = rest[end:].lstrip().removeprefix(self.closing).lstrip(" \n;,")
        read = [found for call in calls if (found := self._call(call)) and found["name"] in names]
        return read if read and len(read) == len(calls) else None

    def _call(self, call: Any) -> dict[str, str] | None:
        """Return a call as the API gives it: a name, and arguments as JSON in a text."""
        if not isinstance(call, dict):
            return None
        name, arguments = call.get(self.name_key), call.get(self.arguments_key, {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        return {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}


_DUMPED = json.dumps(_ARGUMENTS)  # templates that write the arguments as a text


def learn(codec: Codec) -> ToolForm | None:
    """Return the form in which a codec's template writes calls, None if it has none, or none that is known here."""
    template = codec.template
    if not isinstance(template, ChatTemplate):
        return None
    try:
        plain, calling = (_answer(template, message) for message in (Message("assistant", _SAID), _CALLING))
    except TemplateError:
        return None
    lead = "".join(one.text for one in plain).partition(_SAID)[0]  # before any answer, such as an empty thought
    for place, fragment in enumerate(calling):
        for found in () if fragment.control else _START.finditer(fragment.text):
            try:
                value, end = json.JSONDecoder().raw_decode(fragment.text, found.start())
                before = [*calling[:place], fragment._replace(text=fragment.text[: found.start()])]
                before[0] = before[0]._replace(text=before[0].text.removeprefix(lead))
                return ToolForm(before, value, [fragment._replace(text=fragment.text[end:]), *calling[place + 1 :]])
            except (ValueError, StopIteration, AttributeError, TypeError):
                continue  # no JSON, or none of a call
    return None


def _answer(template: ChatTemplate, message: Message) -> list[Fragment]:
    """Return an answer as a template writes it, without what ends it."""
    fragments = template.examples(Conversation((Message("user", "qXasks"), message), tools=(_TOOL,)))[-1]
    answer = [fragment for fragment in fragments if fragment.answer]
    while answer and answer[-1].control:
        answer.pop()
    return answer


class CallFinder:
    """Takes the calls out of an answer that arrives in pieces. `calls` are there at the end, if it has any."""

    def __init__(self, form: ToolForm, names: Collection[str]):
        self._form, self._names = form, names
        self._marks = StopTexts((form.opening,) if form.opening else ())
        self._text = self._shown = ""
        self._holds = False  # calls may have begun
        self.calls: list[dict[str, Any]] = []

    def add(self, piece: str) -> str:
        """Return what is certainly no call."""
        self._text += piece
        if self._holds:
            return ""
        if self._form.opening:
            shown = self._marks.add(piece)
            self._holds = self._marks.found is not None
        else:  # a call is the whole answer, or nothing of it
            if not self._shown.strip():
                self._holds = self._text.lstrip().startswith(("{", "["))
            shown = "" if self._holds else piece
        self._shown += shown
        return shown

    def end(self) -> str:
        """Return what was kept back and is no call."""
        held = self._text[len(self._shown) :]
        calls = self._form.read(held, self._names) if self._holds else None
        if calls is None:
            return held
        self.calls = [
            {"id": f"call{secrets.token_hex(8)[:5]}", "type": "function", "function": call}
            for call in calls  # nine letters and digits, as the templates of Mistral want them
        ]
        return ""
