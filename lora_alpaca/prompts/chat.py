"""The tokenizer's own chat template (Jinja), made into fragments in which the user's text stays text.

A rendered text does not tell the `<|im_end|>` of the template from one that a user typed. So the shape of a plain
conversation is rendered once with stand-ins for the messages; the control tokens are read from what is around them,
and the texts are filled in afterwards. Every row is compared with its own rendering. Where the two differ, since a
template rewrites a text (drops thoughts from earlier turns, for example), and where a row has tools or thoughts, the
row itself is rendered, with stand-ins for the control tokens that its texts hold.

An answer is learned where it stands as generation would have met it: behind the prompt of its own turn. A conversation
whose template shows an earlier answer otherwise becomes several examples, one for each turn that is served otherwise. A
template that shows a prompt otherwise once it is answered is learned as it is served: the prompt, and the answer.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts.conversation import Conversation, Fragment, Message, joined, without_thought
from lora_alpaca.prompts.escaping import Escape
from lora_alpaca.prompts.rendering import CALLS, RESULTS, THOUGHTS, TOOLS, Rendering, chosen, dated, text_of

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
    """A piece of a rendered conversation: the template's text, one of its control tokens, or the slot of a message.

    `answer` is the position of the message that the piece is an answer of, where generation would have made it.
    """

    what: str | Slot
    control: bool = False
    answer: int | None = None


Placed = tuple[Fragment, int | None]  # a fragment, and the position of the message that it is an answer of


class ChatTemplate:
    """The chat template that a tokenizer brings. `bound(tokenizer)` reads it; only then can it render.

    `source` is its text, or, of a tokenizer that brings one more for conversations with tools, both by their names,
    `default` and `tool_use`.
    """

    name = "chat"
    begins_itself = True  # it writes the beginning-of-text token, or leaves it out

    def __init__(self, source: str | dict[str, str] = "", tokenizer: Any = None):
        self.source = source
        self._rendering = Rendering(source, tokenizer)
        self._render = self._rendering.render
        self._shape = lru_cache(maxsize=256)(self._new_shape)

    def bound(self, tokenizer: Any) -> "ChatTemplate":
        """Return the template with its tokenizer. TemplateError if that has none, or one that cannot be learned."""
        template = ChatTemplate(self.source or dated(chosen(tokenizer.chat_template)), tokenizer)
        template.stop  # noqa: B018  a template without an end token is refused here
        return template

    def check(self, conversation: Conversation) -> None:
        """Raise TemplateError for a document, and for tools or thoughts that the template leaves out."""
        if conversation.is_document:
            raise TemplateError(f"{conversation.where}: a text without a prompt, which only the template plain takes")
        if conversation.is_plain:
            return
        messages = conversation.messages
        asked = {
            TOOLS: bool(conversation.tools),
            CALLS: any(message.calls for message in messages),
            RESULTS: any(message.role == "tool" for message in messages),
            THOUGHTS: any(message.reasoning for message in messages),
        }
        for what in (what for what, there in asked.items() if there and what not in self._rendering.shown):
            way = "leave them out by --ignore_fields, or " if what == THOUGHTS else ""
            raise TemplateError(
                f"{conversation.where}: {what}, which the chat template leaves out; {way}use a model whose chat "
                "template takes them"
            )

    def prompt(self, conversation: Conversation) -> list[Fragment]:
        """Return what generation is fed: the conversation up to the last answer, and the start of that."""
        return joined(fragment for fragment, _ in self._placed(conversation.prompt))

    def examples(self, conversation: Conversation, learn_reasoning: bool = True) -> list[list[Fragment]]:
        """Return the fragments of each training example of a row: several where the template rewrites earlier answers.

        Each answer to learn is in one of them, as it will be served; thoughts are only seen unless `learn_reasoning`.
        """
        left, result = set(conversation.learned), []
        while left:
            part = conversation.up_to(max(left) + 1)
            placed = self._placed(part)
            if max(left) not in {place for _, place in placed}:
                placed = self._placed(part.prompt) + self._answer(part)
            found = left & {place for _, place in placed if place is not None}
            result.append(joined(_learning(placed, part, found, learn_reasoning)))
            left -= found
        return result[::-1]

    @cached_property
    def stop(self) -> str:
        """Return the control token that ends an answer."""
        parts = self._shape(("user", "assistant"))
        return str([part.what for part in parts if part.answer and part.control][-1])

    def shape(self, roles: tuple[str, ...]) -> list[Part]:
        """Return how plain conversations of these roles look. Raises TemplateError where that is not clear."""
        return self._shape(roles)

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
        source = fields["chat_template"]
        named = isinstance(source, dict) and all(isinstance(text, str) for text in source.values())
        if not isinstance(source, str) and not (named and "default" in source):
            raise TemplateError(f"{where}: the key chat_template is not a text")
        return cls(source)

    # ------------------------------------------------------------------------------------------------- as rendered

    @property
    def _control(self) -> re.Pattern[str]:
        return self._rendering.control

    def _placed(self, conversation: Conversation) -> list[Placed]:
        """Return a conversation as fragments that say of which answer they are; one without an answer is a prompt."""
        rendered = self._render(conversation)
        if conversation.is_plain:
            placed = self._filled(conversation)
            if "".join(fragment.text for fragment, _ in placed) == rendered:
                return placed
        escape = Escape(conversation, self._control)
        text = rendered
        if escape.found:
            escaped = escape.conversation
            text = self._render(escaped)
            if escape.undo(text) != rendered:
                raise TemplateError(
                    f"{conversation.where}: the chat template rewrites this conversation, and its texts hold control "
                    "tokens, which could then not be told from the template's"
                )
            conversation = escaped
        spans = self._spans(conversation, text)
        _require_everything(conversation, text, spans)
        placed = []
        for part in _cut(text, spans, self._texts):
            assert isinstance(part.what, str)  # a stand-in is that of a control token
            written = part.what if part.control else escape.undo(part.what)
            placed.append((Fragment(written, False, part.control, part.answer is not None), part.answer))
        return placed

    def _answer(self, conversation: Conversation) -> list[Placed]:
        """Return the last answer of a conversation, whose prompt the template shows otherwise once it is answered.

        The answer begins behind the end of the prompt, which is where a stand-in for the answer begins too.
        """
        escape = Escape(conversation, self._control)
        place = len(conversation.messages) - 1
        marked = replace(conversation, messages=(*conversation.messages[:place], Message("assistant", "qXanswerXq")))
        prompt, answered = (self._render(one) for one in (escape.conversation.prompt, escape.conversation))
        other = self._render(Escape(marked, self._control).conversation)
        tokens = [found.start() for found in self._control.finditer(prompt)]
        ending = prompt[tokens[-1] :] if tokens else prompt
        same = next((n for n, (a, b) in enumerate(zip(answered, other, strict=False)) if a != b), len(answered))
        start = answered.rfind(ending, 0, same) + len(ending)
        end = self._end(answered, start)
        written = other[start : other.find("qXanswerXq", start)]
        if start < len(ending) or end is None or self._control.search(written) or "qXanswerXq" not in other[start:]:
            raise TemplateError(
                f"{conversation.where}: the chat template rewrites this conversation so that its last prompt is "
                "another one; use vicuna or chatml"
            )
        placed: list[Placed] = []
        for part in self._texts(answered[start:end]):
            text = str(part.what) if part.control else escape.undo(str(part.what))
            placed.append((Fragment(text, False, part.control, True), place))
        return placed

    def _filled(self, conversation: Conversation) -> list[Placed]:
        """Return a plain conversation in the shape of its roles."""
        try:
            parts = self._shape(tuple(message.role for message in conversation.messages))
        except TemplateError as error:
            where = conversation.where
            raise TemplateError(f"{where}: {error}" if where else str(error)) from None
        texts = [text_of(message) for message in conversation.messages]
        return [
            (
                Fragment(
                    part.what.fill(texts[part.what.number]) if isinstance(part.what, Slot) else part.what,
                    False, part.control, part.answer is not None,
                ),
                part.answer,
            )
            for part in parts
        ]  # fmt: skip

    def _spans(self, conversation: Conversation, whole: str) -> dict[int, tuple[int, int]]:
        """Return the stretches of answers in a rendered conversation, those that generation would have met so.

        They go from where generation starts to the end of the end token.
        """
        spans = {}
        for place, message in enumerate(conversation.messages):
            if message.role == "assistant":
                prompt = self._render(conversation.up_to(place))
                answered = self._render(conversation.up_to(place + 1))
                end = self._end(answered, len(prompt)) if answered.startswith(prompt) else None
                if end and whole.startswith(answered[:end]):
                    spans[place] = (len(prompt), end)
        return spans

    def _end(self, rendered: str, start: int) -> int | None:
        """Return where an answer ends: behind its end token, or behind its last control token if it has none."""
        stop = rendered.find(self.stop, start)
        if stop >= 0:
            return stop + len(self.stop)
        return max((found.end() for found in self._control.finditer(rendered, start)), default=None)

    # ------------------------------------------------------------------------------------------------- shapes

    def _new_shape(self, roles: tuple[str, ...]) -> list[Part]:
        """Return how conversations of one sequence of roles look; one that does not end with an answer is a prompt.

        Raises TemplateError if not even an answer to a single question is clear.
        """
        standing = Conversation(tuple(_stand_ins(roles)))
        whole = self._render(standing)
        spans: dict[int, tuple[int, int]] = {}
        for number in (number for number, role in enumerate(roles) if role == "assistant"):
            prompt, upto = self._render(standing.up_to(number)), self._render(standing.up_to(number + 1))
            slot = upto.find(f"qX{number}Xq", len(prompt))
            end = self._control.search(upto, slot) if slot >= 0 else None
            if end and upto.startswith(prompt) and whole.startswith(upto[: end.end()]):
                spans[number] = (len(prompt), end.end())
            elif roles == ("user", "assistant"):
                what = "has no end token after" if upto.startswith(prompt) else "does not repeat its prompt before"
                raise TemplateError(f"template chat: the chat template {what} an answer; use vicuna or chatml")
        return list(_cut(whole, spans, self._parts))

    def _parts(self, rendered: str) -> Iterator[Part]:
        """Yield rendered stand-ins as parts."""
        start = 0
        for found in _STAND_IN.finditer(rendered):
            yield from self._texts(rendered[start : found.start()])
            yield Part(Slot(int(found["number"]), not found["left"], not found["right"]))
            start = found.end()
        yield from self._texts(rendered[start:])

    def _texts(self, text: str) -> Iterator[Part]:
        """Yield the template's own text as texts and control tokens."""
        for piece in filter(None, self._control.split(text)):
            yield Part(piece, control=self._control.fullmatch(piece) is not None)


def _cut(rendered: str, spans: dict[int, tuple[int, int]], read: Callable[[str], Iterator[Part]]) -> Iterator[Part]:
    """Yield a rendered conversation as the parts that `read` finds, cut where answers begin and end."""
    borders = sorted({0, len(rendered), *(position for span in spans.values() for position in span)})
    for start, stop in pairwise(borders):
        answer = next((place for place, (first, last) in spans.items() if first <= start < last), None)
        for part in read(rendered[start:stop]):
            yield part._replace(answer=answer)


def _require_everything(conversation: Conversation, rendered: str, spans: dict[int, tuple[int, int]]) -> None:
    """Raise TemplateError if the template leaves out a tool result, or a thought or text of an answer that it shows."""
    for place, message in enumerate(conversation.messages):
        shown, parts = rendered, {}
        if message.role == "tool":
            parts = {"a tool result": message.text}
        elif place in spans:
            shown = rendered[slice(*spans[place])]
            parts = {"the thought of an answer": message.reasoning} | (
                {"the text beside a tool call": message.text} if message.calls else {}
            )
        for what, text in parts.items():
            text = text.strip()
            if text not in shown and json.dumps(text, ensure_ascii=False)[1:-1] not in shown:
                raise TemplateError(
                    f"{conversation.where}: the chat template leaves out {what} ({text[:40]!r}); take it out of the "
                    "row, or use a model whose chat template shows it"
                )


def _learning(
    placed: Iterable[Placed], conversation: Conversation, places: set[int], learn_reasoning: bool
) -> Iterator[Fragment]:
    """Yield fragments with the answers at some places to learn."""
    for place, group in groupby(placed, key=lambda one: one[1]):
        fragments = joined(fragment for fragment, _ in group)
        if place in places:
            assert place is not None
            fragments = [fragment._replace(learned=True) for fragment in fragments]
            if not learn_reasoning:
                fragments = without_thought(fragments, conversation.messages[place])
        yield from fragments


def _stand_ins(roles: Iterable[str]) -> list[Message]:
    return [Message(role, f"{_PADDING}qX{number}Xq{_PADDING[::-1]}") for number, role in enumerate(roles)]
