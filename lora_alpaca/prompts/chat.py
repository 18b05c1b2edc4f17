"""The tokenizer's own chat template (Jinja), made into fragments in which the user's text stays text.

A rendered text does not tell the `<|im_end|>` of the template from one that a user typed. So the shape of a
conversation is rendered once with stand-ins for the messages; the control tokens are read from what is around them,
and the texts are filled in afterwards. Every row is then compared with its own plain rendering: where the two differ,
since a template rewrites a text (drops thoughts from earlier turns, for example), only the last answer is learned.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts.conversation import Conversation, Fragment, Message, joined

_PADDING = " \n"  # around a stand-in, to see whether the template strips the text
_STAND_IN = re.compile(r"(?P<left> \n)?qX(?P<number>\d+)Xq(?P<right>\n )?")


@dataclass(frozen=True)
class Slot:
    """The position of message `number` in a rendered conversation, and on which sides its text is stripped."""

    number: int
    strip_left: bool
    strip_right: bool

    def fill(self, text: str) -> str:
        text = text.lstrip() if self.strip_left else text
        return text.rstrip() if self.strip_right else text


class Part(NamedTuple):
    """A piece of a rendered conversation: the template's text, one of its control tokens, or the slot of a message."""

    what: str | Slot
    learned: bool = False
    control: bool = False
    answer: bool = False


class ChatTemplate:
    """The chat template that a tokenizer brings. `bound(tokenizer)` reads it; only then can it render."""

    name = "chat"
    begins_itself = True  # it writes the beginning-of-text token, or leaves it out

    def __init__(self, source: str = "", tokenizer: Any = None):
        self.source = source
        self._tokenizer = tokenizer
        self._shape = lru_cache(maxsize=256)(self._new_shape)

    def bound(self, tokenizer: Any) -> "ChatTemplate":
        """Return the template with its tokenizer. TemplateError if that has none, or one that cannot be learned."""
        source = self.source or tokenizer.chat_template
        if not isinstance(source, str):
            raise TemplateError(
                "template chat: the tokenizer brings no chat template" if not source else
                "template chat: the tokenizer brings several chat templates; save it with the one to use"
            )  # fmt: skip
        template = ChatTemplate(self.source or _dated(source), tokenizer)
        template.stop  # noqa: B018  a template without an end token is refused here
        return template

    def check(self, conversation: Conversation) -> None:
        """Raise TemplateError for a document, which is no conversation."""
        if conversation.is_document:
            raise TemplateError(f"{conversation.where}: a text without a prompt, which only the template plain takes")

    def prompt(self, conversation: Conversation) -> list[Fragment]:
        """Return what generation is fed: the conversation up to the last user message, and the start of an answer."""
        messages = list(conversation.messages)
        if messages[-1].role == "assistant":
            messages.pop()
        rendered = self._render(messages, True, conversation.where)
        fragments = self._shaped(messages, False, conversation.where)
        if "".join(fragment.text for fragment in fragments) != rendered:
            fragments = self._rewritten(rendered, messages, conversation.where)
        return joined(iter(fragments))

    def render(self, conversation: Conversation, last_only: bool = False) -> list[Fragment]:
        """Return the fragments of a training row; where the template rewrites answers, the last alone is learned."""
        messages, where = list(conversation.messages), conversation.where
        rendered = self._render(messages, False, where)
        fragments = self._shaped(messages, last_only, where)
        if "".join(fragment.text for fragment in fragments) != rendered:
            before = self.prompt(conversation)
            prompt = "".join(fragment.text for fragment in before)
            if not rendered.startswith(prompt):
                raise TemplateError(
                    f"{where}: the chat template rewrites this conversation so that its last prompt is another one; "
                    "use vicuna or chatml"
                )
            rest = self._rewritten(rendered[len(prompt) :], messages, where)
            end = next((number for number, fragment in enumerate(rest) if fragment.control), len(rest))
            answer = [
                fragment._replace(learned=number <= end, answer=number <= end) for number, fragment in enumerate(rest)
            ]
            fragments = [*before, *answer]
        return joined(iter(fragments))

    @cached_property
    def stop(self) -> str:
        """Return the control token that ends an answer."""
        parts = self._shape(("user", "assistant"), False)
        return str([part.what for part in parts if part.learned and part.control][-1])

    def response(self, text: str) -> str:
        """Return the answer in generated text, which holds new tokens only."""
        return text.strip()

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {"name": self.name, "chat_template": self.source}

    def digest(self) -> str:
        """Return a sha256 of the template; the one that a tokenizer is still to bring counts as none."""
        return hashlib.sha256(json.dumps(self.source).encode()).hexdigest()

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: str) -> "ChatTemplate":
        """Return a recorded chat template, still to be bound."""
        if not isinstance(fields["chat_template"], str):
            raise TemplateError(f"{where}: the key chat_template is not a text")
        return cls(fields["chat_template"])

    # ------------------------------------------------------------------------------------------------- shapes

    def _shaped(self, messages: list[Message], last_only: bool, where: str) -> list[Fragment]:
        """Return the fragments of messages, if the template does nothing to their texts but strip them."""
        try:
            return _filled(self._shape(tuple(message.role for message in messages), last_only), messages)
        except TemplateError as error:
            raise TemplateError(f"{where}: {error}" if where else str(error)) from None

    def _new_shape(self, roles: tuple[str, ...], last_only: bool) -> list[Part]:
        """Return how conversations of one sequence of roles look; TemplateError if not even the last answer is clear.

        An answer can be learned if the whole conversation shows it as generation would have met it at the time. A
        conversation that does not end with an answer is a prompt.
        """
        messages, is_prompt = _stand_ins(roles), roles[-1] != "assistant"
        whole = self._render(messages, is_prompt)
        spans = []  # of the answers, each from where generation starts to the end of its end token
        for number in (number for number, role in enumerate(roles) if role == "assistant"):
            prompt, upto = self._render(messages[:number], True), self._render(messages[: number + 1], False)
            slot = upto.find(f"qX{number}Xq", len(prompt))
            end = self._control.search(upto, slot) if slot >= 0 else None
            if end and upto.startswith(prompt) and whole.startswith(upto[: end.end()]):
                spans.append((len(prompt), end.end()))
            elif number == len(roles) - 1:
                what = "has no end token after" if upto.startswith(prompt) else "does not repeat its prompt before"
                raise TemplateError(f"template chat: the chat template {what} an answer; use vicuna or chatml")
        if len(spans) < roles.count("assistant"):
            spans = [] if is_prompt else spans[-1:]
        parts: list[Part] = []
        for start, stop in pairwise(sorted({0, len(whole), *(position for span in spans for position in span)})):
            is_answer = any(first <= start < last for first, last in spans)
            is_learned = is_answer and not is_prompt and (not last_only or start == spans[-1][0])
            found = self._parts(whole, start, stop)
            parts += [part._replace(answer=is_answer, learned=is_learned) for part in found]
        return parts

    def _parts(self, rendered: str, start: int, stop: int) -> Iterator[Part]:
        """Yield a stretch of rendered stand-ins as parts."""
        for found in _STAND_IN.finditer(rendered, start, stop):
            yield from self._texts(rendered[start : found.start()])
            yield Part(Slot(int(found["number"]), not found["left"], not found["right"]))
            start = found.end()
        yield from self._texts(rendered[start:stop])

    def _texts(self, text: str) -> Iterator[Part]:
        """Yield the template's own text as texts and control tokens."""
        for piece in filter(None, self._control.split(text)):
            yield Part(piece, control=self._control.fullmatch(piece) is not None)

    def _rewritten(self, rendered: str, messages: list[Message], where: str) -> list[Fragment]:
        """Return a text in which the user's words cannot be found again: safe if they hold no control token."""
        if any(self._control.search(_text(message)) for message in messages):
            raise TemplateError(
                f"{where}: the chat template rewrites this conversation, and its texts hold control tokens, "
                "which could then not be told from the template's"
            )
        return _filled(self._texts(rendered), messages)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Return a pattern of the tokenizer's control tokens, with a group around it."""
        tokens = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)") + ")")

    def _render(self, messages: list[Message], generates: bool, where: str = "") -> str:
        """Return the text that transformers renders."""
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": _text(message)} for message in messages],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=generates,
            )
        except Exception as error:  # Jinja's, and whatever a template raises by its own choice
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TemplateError(f"{where}{': ' if where else ''}the chat template refuses: {reason}") from None
        return str(text)


def _stand_ins(roles: Iterable[str]) -> list[Message]:
    return [Message(role, f"{_PADDING}qX{number}Xq{_PADDING[::-1]}") for number, role in enumerate(roles)]


def _filled(parts: Iterable[Part], messages: list[Message]) -> list[Fragment]:
    """Return parts as fragments, with the messages in their slots."""
    texts = [_text(message) for message in messages]
    return [
        Fragment(part.what.fill(texts[part.what.number]) if isinstance(part.what, Slot) else part.what, *part[1:])
        for part in parts
    ]


def _dated(source: str) -> str:
    """Return a template that tells the model today's date with that date written out: tomorrow's prompt is the same."""
    today = datetime.date.today()
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: json.dumps(today.strftime(call[2])), source)


def _text(message: Message) -> str:
    """Return what a message says, the input below the instruction."""
    return f"{message.text}\n\n{message.input}" if message.input else message.text
