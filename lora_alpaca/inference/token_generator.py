"""What answers prompts, token ids in and token ids out; it knows nothing about text."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from lora_alpaca.inference.sampling import Request, Token


class Channel:
    """From the thread that makes an answer to the one that reads it, which the maker never waits for."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[list[Token] | BaseException | None] = queue.SimpleQueue()
        self.left = threading.Event()  # nobody reads any more
        self._tell: Callable[[], None] | None = None

    def put(self, tokens: list[Token]) -> None:
        """Hand over the tokens of a step."""
        self._hand_over(tokens)

    def end(self, error: BaseException | None = None) -> None:
        """Say that no more tokens come, and why, if that is an error."""
        self._hand_over(error)

    def get(self) -> list[Token] | BaseException | None:
        """Wait for the next step, or the end."""
        return self._arrived.get()

    @property
    def is_empty(self) -> bool:
        """Return whether `get` would wait."""
        return self._arrived.empty()

    def on_arrival(self, tell: Callable[[], None]) -> None:
        """Let a function be called after everything that arrives, in the thread of the maker, whom it may not delay."""
        self._tell = tell

    def _hand_over(self, item: list[Token] | BaseException | None) -> None:
        self._arrived.put(item)
        if self._tell is not None:
            self._tell()


class TokenStream(Iterator[list[Token]]):
    """The tokens of an answer, a list for every step. Closing or dropping it stops the answer at the next token."""

    def __init__(self, channel: Channel):
        self._channel, self._ended = channel, False

    def __next__(self) -> list[Token]:
        if self._ended:
            raise StopIteration
        item = self._channel.get()
        if isinstance(item, list):
            return item
        self._ended = True
        raise StopIteration if item is None else item

    @property
    def is_ready(self) -> bool:
        """Return whether the next step, or the end, is there already."""
        return self._ended or not self._channel.is_empty

    def on_arrival(self, tell: Callable[[], None]) -> None:
        """Let a function be called, in another thread, whenever the stream may have become ready."""
        self._channel.on_arrival(tell)

    def close(self) -> None:
        """Stop the answer."""
        self._ended = True
        self._channel.left.set()

    def __del__(self) -> None:
        self._channel.left.set()


class TokenGenerator(Protocol):
    """Several threads may call it; no reader makes another one wait."""

    def generate(self, request: Request) -> TokenStream:
        """Begin an answer, and return its tokens as they are made, the one that stops it included.

        An empty list says that a token was made and none is certain yet, as in a beam search. The stream raises what
        the model raises.
        """
        ...

    def score(self, request: Request) -> TokenStream:
        """Return the tokens of a prompt behind its first one, in one step, with their log-probabilities."""
        ...

    def close(self) -> None:
        """Stop every answer; their readers, and those who ask from now on, get a RuntimeError."""
        ...
