"""Messages and conversations, and the fragments of text and control tokens that a template makes of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

EOS = "{eos}"  # the control token that stands for the tokenizer's end token, whatever that is called


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `role` is system, user, assistant or tool; `input` is Alpaca's second text of a user's message.

    Of an assistant's message, `learned` is whether it is an answer to learn, `reasoning` the thought before the answer,
    and `calls` are its tool calls as the chat templates of transformers take them:
    `{"id": ..., "type": "function", "function": {"name": ..., "arguments": {...}}}`. A tool's message is the result of
    the call `call_id` of the function `name`.
    """

    role: str
    text: str
    input: str = ""
    learned: bool = True
    reasoning: str = ""
    calls: tuple[Any, ...] = ()
    call_id: str = ""
    name: str = ""

    @property
    def is_blank(self) -> bool:
        """Return whether the message says nothing."""
        return not (self.text.strip() or self.input.strip() or self.reasoning.strip() or self.calls)

    @property
    def is_plain(self) -> bool:
        """Return whether the message is nothing but its text."""
        return self.role != "tool" and not self.reasoning and not self.calls

    def texts(self) -> Iterator[str]:
        """Yield every text that somebody wrote, calls as JSON."""
        yield from filter(None, (self.text, self.input, self.reasoning))
        yield from (as_text(call) for call in self.calls)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system message or none, then user and assistant in turn; `where` the row stands ("alpaca.json:17").

    Between a tool call of the assistant and its next message are the results. `tools` are the definitions of the
    functions that may be called, as JSON schema in the form of OpenAI. A document, text to be continued, is one message
    of the assistant and nothing else.
    """

    messages: tuple[Message, ...]
    where: str = ""
    tools: tuple[Any, ...] = ()

    @classmethod
    def of(cls, instruction: str, input: str = "", output: str | None = None, where: str = "") -> "Conversation":
        """Return a conversation of one instruction and, if there is an output, its answer."""
        answer = () if output is None else (Message("assistant", output),)
        return cls((Message("user", instruction, input), *answer), where)

    @property
    def system(self) -> str:
        """Return the text of the system message, empty if there is none."""
        return self.messages[0].text if self.messages and self.messages[0].role == "system" else ""

    @property
    def answers(self) -> list[str]:
        """Return the texts of the assistant."""
        return [message.text for message in self.messages if message.role == "assistant"]

    @property
    def learned(self) -> list[int]:
        """Return the positions of the answers to learn."""
        return [place for place, message in enumerate(self.messages) if message.role == "assistant" and message.learned]

    @property
    def users(self) -> list[Message]:
        """Return the messages of the user."""
        return [message for message in self.messages if message.role == "user"]

    @property
    def question(self) -> Message:
        """Return the last message of the user."""
        return self.users[-1]

    @property
    def is_document(self) -> bool:
        """Return whether this is text to be continued, which nobody asked for."""
        return len(self.messages) == 1 and self.messages[0].role == "assistant"

    @property
    def is_plain(self) -> bool:
        """Return whether the conversation is nothing but the texts of its messages."""
        return not self.tools and all(message.is_plain for message in self.messages)

    @property
    def prompt(self) -> "Conversation":
        """Return what comes before the last answer."""
        return self.up_to(len(self.messages) - 1) if self.messages[-1].role == "assistant" else self

    def up_to(self, place: int) -> "Conversation":
        """Return the first `place` messages."""
        return replace(self, messages=self.messages[:place])

    def with_system(self, system: str) -> "Conversation":
        """Return the same conversation with a system message: its own one, or the given one if it has none."""
        if not system or self.system:
            return self
        return replace(self, messages=(Message("system", system), *self.messages))

    def learning(self, places: set[int]) -> "Conversation":
        """Return the same conversation with the answers at these positions to learn, and no others."""
        messages = (
            message if message.role != "assistant" else replace(message, learned=place in places)
            for place, message in enumerate(self.messages)
        )
        return replace(self, messages=tuple(messages))

    def texts(self) -> Iterator[str]:
        """Yield every text that somebody wrote, tools and calls as JSON."""
        for message in self.messages:
            yield from message.texts()
        yield from (as_text(tool) for tool in self.tools)


class Fragment(NamedTuple):
    """A stretch of text, or one control token by its name, and whether it is learned.

    `answer` marks what generation would have made, learned or not: it is encoded apart from what stands before it. Of
    a learned text, the first `seen` characters are not learned.
    """

    text: str
    learned: bool
    control: bool = False
    answer: bool = False
    seen: int = 0


def joined(fragments: Iterator[Fragment]) -> list[Fragment]:
    """Return the fragments with neighbouring texts joined, so that they are encoded together; answers stay apart."""
    result: list[Fragment] = []
    for fragment in fragments:
        if result and not fragment.control and not result[-1].control and result[-1].answer == fragment.answer:
            result[-1] = result[-1]._replace(text=result[-1].text + fragment.text)
        elif fragment.control or fragment.text:
            result.append(fragment)
    return result


def without_thought(answer: list[Fragment], message: Message) -> list[Fragment]:
    """Return the fragments of a learned answer with its thought, and the marks around that, seen and not learned."""
    text = "".join(fragment.text for fragment in answer)
    left = _end_of_thought(text, message)
    result = []
    for fragment in answer:
        seen = min(left, len(fragment.text))
        left -= seen
        whole = seen == len(fragment.text) and seen > 0
        result.append(fragment._replace(learned=fragment.learned and not whole, seen=0 if whole else seen))
    return result


def _end_of_thought(text: str, message: Message) -> int:
    """Return where in a rendered answer what is said begins, after the thought of the message; 0 without a thought."""
    thought, said = message.reasoning.strip(), message.text.strip()
    if not thought and "</think>" not in said:
        return 0
    after = text.find(thought) + len(thought) if thought else 0
    start = text.find(said, after) if thought and said else -1
    if start >= 0:
        return start
    mark = text.find("</think>", after)
    after = mark + len("</think>") if mark >= 0 else after
    return after + len(text[after:]) - len(text[after:].lstrip())


def as_text(value: Any) -> str:
    """Return a tool definition or call as JSON."""
    return json.dumps(value, ensure_ascii=False)
