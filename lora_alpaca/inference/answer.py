"""An answer as it is made: its text in pieces, why it ended, and what it cost."""

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Literal, NamedTuple

from lora_alpaca.inference.codec import Codec, StopTexts, Stripping
from lora_alpaca.inference.sampling import Request, Token
from lora_alpaca.inference.token_generator import TokenStream

FinishReason = Literal["stop", "length"]


class TextToken(NamedTuple):
    """A token of an answer, its text and log-probability in nats, and the likeliest (id, log-probability) pairs."""

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...]


class Answer(Iterator[str]):
    """The pieces of an answer, which joined are `text`. Closing it stops the model at the next token.

    There is a piece for every step, empty where there is nothing to show yet: half a character, a text that may become
    a stop text, white space that may be the end. With several beams, the whole answer is one piece.

    While it is read, `text`, `completion_tokens` and, if log-probabilities were asked for, `tokens` grow. At the end
    `finish_reason` is "stop" (an end token, or the text `stop`) or "length" (no token was left), and `ended_by` the id
    of the end token, if there was one.
    """

    def __init__(self, codec: Codec, request: Request, arriving: TokenStream, strip: bool = True):
        self.text = ""
        self.prompt_tokens, self.completion_tokens = len(request.prompt_ids), 0
        self.tokens: list[TextToken] = []
        self.finish_reason: FinishReason | None = None
        self.ended_by: int | None = None
        self.stop: str | None = None
        self.shown_ids: Collection[int] = ()  # control tokens whose names are part of the text
        self._codec, self._request, self._arriving = codec, request, arriving
        self._decoder, self._stops = codec.decoder(), StopTexts(request.sampling.stop)
        self._strip = Stripping() if strip else None
        self._untold: deque[tuple[int, TextToken]] = deque()  # tokens, each with where its text ends
        self._made, self._shown = 0, 0  # characters
        self._closed = False

    def __next__(self) -> str:
        if self._closed:
            raise StopIteration
        try:
            tokens = next(self._arriving, None)
        except BaseException:
            self._closed = True
            raise
        shown = self._stops.add("".join(map(self._add, tokens or ())))
        ended = self.ended_by is not None or self._stops.found is not None
        if tokens is None or ended:
            self.close()
            shown += self._stops.add(self._decoder.flush()) + self._stops.flush()
            self.stop = self._stops.found
            self.finish_reason = "stop" if ended or self.stop is not None else "length"
        self._tell(len(shown))
        shown = shown if self._strip is None else self._strip.add(shown)
        self.text += shown
        return shown

    def read(self) -> str:
        """Read to the end and return the text."""
        for _ in self:
            pass
        return self.text

    @property
    def is_ready(self) -> bool:
        """Return whether the next piece, or the end, is there already."""
        return self._closed or self._arriving.is_ready

    def on_arrival(self, tell: Callable[[], None]) -> None:
        """Let a function be called, in another thread, whenever the answer may have become ready."""
        self._arriving.on_arrival(tell)

    def close(self) -> None:
        """Stop the answer where it is."""
        self._closed = True
        self._arriving.close()

    def _tell(self, characters: int) -> None:
        """Add to `tokens` those whose text is shown now: none of a stop text, and none of what may become one."""
        self._shown += characters
        is_all = self.finish_reason is not None and self.stop is None
        while self._untold and (is_all or self._untold[0][0] <= self._shown):
            self.tokens.append(self._untold.popleft()[1])

    def _add(self, token: Token) -> str:
        """Return the text that a token adds, and keep what is to be told of it."""
        piece = self._text(token)
        self._made += len(piece)
        if self._request.sampling.logprobs is not None and self.ended_by is None:
            text = self._codec.token_texts.text(token.id)
            self._untold.append((self._made, TextToken(token.id, text, token.logprob, token.top)))
        return piece

    def _text(self, token: Token) -> str:
        """Return the text that a token adds, after counting it; none behind the one that ends the answer."""
        if self.ended_by is not None:
            return ""
        self.completion_tokens += 1
        if token.id in self._request.stop_ids:
            self.ended_by = token.id
            return ""
        if token.id not in self._codec.control_ids:
            return self._decoder.add(token.id)
        shown = token.id in self.shown_ids
        return self._decoder.flush() + self._codec.token_texts.text(token.id) if shown else ""
