"""Messages and conversations, and the fragments of text and control tokens that a template makes of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

EOS = "{eos}"  # the control token that stands for the tokenizer's end token, whatever that is called


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `role` is system, user or assistant; `input` is Alpaca's second text, of a user's message only."""

    role: str
    text: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system message or none, then user and assistant in turn; `where` the row stands ("alpaca.json:17").

    A document, text to be continued, is one message of the assistant and nothing else.
    """

    messages: tuple[Message, ...]
    where: str = ""

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

    def texts(self) -> Iterator[str]:
        """Yield every text that somebody wrote."""
        for message in self.messages:
            yield message.text
            if message.input:
                yield message.input


class Fragment(NamedTuple):
    """A stretch of text, or one control token by its name, and whether it is learned.

    `answer` marks what generation would have made, learned or not: it is encoded apart from what stands before it.
    """

    text: str
    learned: bool
    control: bool = False
    answer: bool = False


def joined(fragments: Iterator[Fragment]) -> list[Fragment]:
    """Return the fragments with neighbouring texts joined, so that they are encoded together; answers stay apart."""
    result: list[Fragment] = []
    for fragment in fragments:
        if result and not fragment.control and not result[-1].control and result[-1].answer == fragment.answer:
            result[-1] = fragment._replace(text=result[-1].text + fragment.text)
        elif fragment.control or fragment.text:
            result.append(fragment)
    return result
