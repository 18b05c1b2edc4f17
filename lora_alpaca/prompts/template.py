"""Templates of text: alpaca-lora's four keys, and optional ones for system messages and several turns."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts.conversation import EOS, Conversation, Fragment, joined, without_thought

REQUIRED = ("prompt_input", "prompt_no_input", "response_split")
PLACEHOLDERS = {  # that a key may hold; the first ones it must
    "prompt_input": ("instruction", "input"),
    "prompt_no_input": ("instruction",),
    "turn": ("instruction",),
    "system": ("system",),
    "answer": ("output",),
    "end": (),
}
_BRACES = re.compile(r"\{[^{}\n]{0,40}\}")


@dataclass(frozen=True)
class Template:
    """A prompt format. Public attributes are the keys of its JSON file, which `templates/README.md` explains."""

    name: str
    prompt_input: str
    prompt_no_input: str
    response_split: str
    description: str = ""
    system: str = ""  # what a system message looks like, before the first prompt; empty: there can be none
    default_system: str = ""  # the system message of rows that bring none
    turn: str = ""  # the prompt of later turns; empty: there is only one
    answer: str = "{output}"
    end: str = EOS  # what follows an answer: its first control token is learned, and stops generation
    control: tuple[str, ...] = ()  # the tokens of the vocabulary that stand in these texts

    begins_itself = False  # whether it writes the beginning-of-text token, where the tokenizer has one

    def bound(self, tokenizer: Any) -> "Template":
        """Return the template for this tokenizer; TemplateError if that lacks a control token it needs."""
        known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        for token in self.control:
            if token not in known:
                raise TemplateError(
                    f"template {self.name}: the tokenizer has no control token {token}, so answers would have no end; "
                    "use vicuna, or chat if the model brings a chat template"
                )
        return self

    def check(self, conversation: Conversation) -> None:
        """Raise TemplateError for a conversation that this template cannot hold."""
        where = f"{conversation.where}: " if conversation.where else ""
        others = "vicuna, chatml or chat"
        if len(conversation.users) > 1 and not self.turn:
            turns = len(conversation.users)
            raise TemplateError(f"{where}{turns} turns, and the template {self.name} takes one; use {others}")
        if conversation.system and not self.system:
            raise TemplateError(f"{where}a system message, and the template {self.name} has none; use {others}")
        if conversation.is_document and self.name != "plain":
            raise TemplateError(f"{where}a text without a prompt, which only the template plain takes")
        if conversation.tools or any(message.role == "tool" or message.calls for message in conversation.messages):
            raise TemplateError(
                f"{where}tools, and the template {self.name} has none; use --prompt_template_name chat on a model "
                "whose chat template takes them"
            )
        if any(message.reasoning for message in conversation.messages):
            raise TemplateError(
                f"{where}a thought (reasoning_content), and the template {self.name} has no place for one; use "
                "--prompt_template_name chat on a model that thinks, or leave thoughts out by --ignore_fields"
            )

    def prompt(self, conversation: Conversation) -> list[Fragment]:
        """Return what generation is fed: everything before the answer to the last user message."""
        return joined(self._before(conversation, len(conversation.users) - 1))

    def examples(self, conversation: Conversation, learn_reasoning: bool = True) -> list[list[Fragment]]:
        """Return the fragments of each training example of a row, which is one, or none if it has nothing to learn.

        A thought in the text of an answer (`<think>...</think>`) is only seen unless `learn_reasoning`.
        """
        return [joined(self._all(conversation, learn_reasoning))] if conversation.learned else []

    def _all(self, conversation: Conversation, learn_reasoning: bool) -> Iterator[Fragment]:
        answers = [message for message in conversation.messages if message.role == "assistant"]
        for number, message in enumerate(answers):
            yield from self._prompt_of(conversation, number)
            answer = joined(self._answer(message.text, learned=message.learned, ends=number == len(answers) - 1))
            yield from answer if learn_reasoning else without_thought(answer, message)

    def _before(self, conversation: Conversation, number: int) -> Iterator[Fragment]:
        """Yield the fragments before answer `number`: the turns before it, not learned, and its prompt."""
        for earlier in range(number):
            yield from self._prompt_of(conversation, earlier)
            yield from self._answer(conversation.answers[earlier], learned=False, ends=False)
        yield from self._prompt_of(conversation, number)

    def _prompt_of(self, conversation: Conversation, number: int) -> Iterator[Fragment]:
        if conversation.is_document:
            return
        message = conversation.users[number]
        values = {"instruction": message.text, "input": message.input}
        if number:
            values["instruction"] = f"{message.text}\n\n{message.input}" if message.input else message.text
            yield from self._fill(self.turn, values)
            return
        if system := conversation.system or self.default_system:
            yield from self._fill(self.system, {"system": system})
        yield from self._fill(self.prompt_input if message.input else self.prompt_no_input, values)

    def _answer(self, text: str, learned: bool, ends: bool) -> Iterator[Fragment]:
        """Yield an answer and its end token. What the template puts behind that belongs to the next prompt."""
        for fragment in self._fill(self.answer, {"output": text}):
            yield fragment._replace(learned=learned, answer=True)
        ended = False
        for fragment in self._fill(self.end, {}):
            yield fragment if ended else fragment._replace(learned=learned, answer=True)
            ended |= fragment.control
            if ended and ends:
                return

    def _fill(self, form: str, values: dict[str, str]) -> Iterator[Fragment]:
        """Yield a form with its placeholders filled, in one pass: braces typed by a user, `{input}` too, stay text."""
        for kind, piece in pieces(form, self.control):
            yield Fragment(values[piece] if kind == "placeholder" else piece, False, kind == "control")

    @property
    def stop(self) -> str:
        """Return the control token that ends an answer, `EOS` for the tokenizer's own end token."""
        return next(piece for kind, piece in pieces(self.end, self.control) if kind == "control")

    def response(self, text: str) -> str:
        """Return the answer in generated text, which holds new tokens only; nothing is searched for or split."""
        return text.strip()

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads: the keys that are not left at their defaults."""
        found = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, (value, default) in found.items()
            if value != default
        }

    def digest(self) -> str:
        """Return a sha256 of everything that shapes a prompt; name and description do not."""
        shape = {key: value for key, value in self.to_json().items() if key not in ("name", "description")}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_json(cls, given: dict[str, Any], name: str, where: str) -> "Template":
        """Return the template that a JSON object describes; TemplateError names the key that is amiss."""
        keys = [field.name for field in fields(cls)]
        for key in sorted(given.keys() - set(keys)):
            near = difflib.get_close_matches(key, keys, n=1)
            raise TemplateError(
                f"{where}: unknown key {key!r}; " + (f"did you mean {near[0]}?" if near else f"keys: {keys}")
            )
        for key in REQUIRED:
            if key not in given:
                raise TemplateError(f"{where}: the key {key} is missing")
        control = given.get("control", [])
        if not isinstance(control, list) or not all(isinstance(token, str) and token for token in control):
            raise TemplateError(f"{where}: the key control is not a list of tokens")
        for key, value in given.items():
            if key != "control" and not isinstance(value, str):
                raise TemplateError(f"{where}: the key {key} is not a text")
        template = cls(**{"name": name} | given | {"control": tuple(control)})
        template._check_forms(where)
        return template

    def _check_forms(self, where: str) -> None:
        for key, allowed in PLACEHOLDERS.items():
            if key in REQUIRED or getattr(self, key):
                _check_placeholders(getattr(self, key), key, allowed, where)
        for key in ("prompt_input", "prompt_no_input"):
            if self.response_split not in getattr(self, key):
                raise TemplateError(f"{where}: response_split {self.response_split!r} does not occur in {key}")
        if not any(kind == "control" for kind, _ in pieces(self.end, self.control)):
            raise TemplateError(f"{where}: end has no {EOS} and no control token; answers would not stop")
        if self.default_system and not self.system:
            raise TemplateError(f"{where}: default_system needs the key system, which says where it stands")


@lru_cache(maxsize=64)
def pieces(form: str, control: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return a form as (kind, text): text as it stands, names of placeholders, and control tokens."""
    tokens = "|".join(map(re.escape, sorted((*control, EOS), key=len, reverse=True)))
    pieces = []
    for piece in re.split(rf"({tokens}|\{{(?:instruction|input|system|output)\}})", form):
        if piece in control or piece == EOS:
            pieces.append(("control", piece))
        elif re.fullmatch(r"\{(instruction|input|system|output)\}", piece):
            pieces.append(("placeholder", piece[1:-1]))
        elif piece:
            pieces.append(("text", piece))
    return pieces


def _check_placeholders(form: str, key: str, allowed: tuple[str, ...], where: str) -> None:
    """Refuse a form that lacks a placeholder, or has a misspelt one that would reach the model as text."""
    for needed in allowed:
        if "{" + needed + "}" not in form:
            raise TemplateError(f"{where}: {key} has no {{{needed}}}")
    names = sorted({name for names in PLACEHOLDERS.values() for name in names})
    for braces in _BRACES.findall(form):
        word = braces[1:-1]
        meant = difflib.get_close_matches(re.split(r"\W", word)[0], names, n=1)
        if braces != EOS and word not in allowed and meant:
            stand = ", ".join((*allowed, "eos"))
            raise TemplateError(f"{where}: {key} has {braces}; only {stand} can stand in braces")
