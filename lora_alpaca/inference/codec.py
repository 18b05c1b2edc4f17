"""Conversations to the ids of a prompt, and ids of an answer to text: the tokenizer and template of one adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_alpaca.artifacts import prompt_contract
from lora_alpaca.data.detokenization import IncrementalDecoder
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference.token_texts import TokenTexts
from lora_alpaca.prompts import AnyTemplate, Conversation


class Codec:
    """Prompts are encoded by the code that training uses, and control strings typed by a user stay text.

    `end_ids` are those of the model's own generation config, `vocabulary` is the number of tokens that it knows.
    """

    def __init__(self, tokenizer: Any, template: AnyTemplate, end_ids: int | list[int] | None, vocabulary: int):
        self.tokenizer = tokenizer
        self.template = template.bound(tokenizer)
        self.vocabulary = vocabulary
        self.stop_ids = prompt_contract.stop_ids(end_ids, tokenizer, template)
        self._encoder = Encoder.for_prompts(tokenizer, self.template, vocabulary)
        self.control_ids = set(self._encoder.text.control_tokens.values())
        self.token_texts = TokenTexts(tokenizer, self._encoder.text.encode(["a"], "first")[0][-1])

    @property
    def takes_turns(self) -> bool:
        """Return whether the template takes the turns that came before."""
        return bool(getattr(self.template, "turn", "chat"))

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Return the ids that the model is fed: those that training saw before an answer, encoded by the same code.

        Raises TemplateError for a conversation that the template cannot hold, ConfigError for a prompt of no token.
        """
        ids = self._encoder.prompt(conversation)
        if not ids:
            raise ConfigError("the prompt is empty, and the model needs a token to begin with")
        return ids

    @property
    def begin_ids(self) -> list[int]:
        """Return the ids that the tokenizer puts before every text."""
        return list(self._encoder.text.bos)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a bare text to be continued, with the tokenizer's own begin token. Raises ConfigError."""
        ids = [*self._encoder.text.bos, *self._encoder.text.encode([text], "first")[0]]
        if not ids:
            raise ConfigError("the prompt is empty, and the model needs a token to begin with")
        return ids

    def known_ids(self, ids: Sequence[int]) -> list[int]:
        """Return ids that a caller gives. Raises ConfigError for none, and for one that the model does not have."""
        if not ids:
            raise ConfigError("the prompt is empty, and the model needs a token to begin with")
        for number in ids:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < self.vocabulary:
                raise ConfigError(
                    f"the prompt has the id {number!r:.40}; this model has ids from 0 to {self.vocabulary - 1}"
                )
        return list(ids)

    def decoder(self) -> IncrementalDecoder:
        """Return what decodes one answer."""
        return IncrementalDecoder(self.decode)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass
class StopTexts:
    """Finds the first of several texts that is complete in one that arrives in pieces, and shows nothing of it."""

    texts: Sequence[str]
    found: str | None = None
    _waiting: str = ""

    def add(self, piece: str) -> str:
        """Return what can be shown now; nothing of a stop text, and nothing behind one."""
        if not self.texts or self.found is not None:
            return "" if self.found is not None else piece
        text = self._waiting + piece
        places = [(place, -len(stop), stop) for stop in self.texts if (place := text.find(stop)) >= 0]
        if places:
            place, _, self.found = min(places)
            self._waiting = ""
            return text[:place]
        kept = max((_overlap(text, stop) for stop in self.texts), default=0)
        self._waiting = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Return what was kept back, at the end of the answer."""
        text, self._waiting = self._waiting, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of another one."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Stripping:
    """Strips a text that arrives in pieces, as a template's `response` strips a whole one.

    White space waits for the text after it, since at the end it is stripped.
    """

    def __init__(self) -> None:
        self._begun, self._waiting = False, ""

    def add(self, piece: str) -> str:
        """Return what can be shown now."""
        text = self._waiting + piece if self._begun else piece.lstrip()
        shown = text.rstrip()
        self._begun, self._waiting = self._begun or bool(shown), text[len(shown) :]
        return shown
