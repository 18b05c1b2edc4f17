"""Token ids to text, one token after another, in linear time."""

from collections.abc import Callable

HALF = "\ufffd"  # what decoders write for bytes that are no character, or not yet
TRIES = 8  # a character has at most four bytes, and so at most four tokens


class IncrementalDecoder:
    """The text that each token adds to a row; joined, the texts are the decoded row.

    A token that holds part of a character adds nothing, and the last part adds the character. `decode` returns the
    text of a list of ids. The decoder gives it a window: the tokens of the last text, since the first token of a
    window may lose a space, and the tokens that have added nothing yet.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._shown = ""  # the text of the window's tokens that have been shown
        self._num_shown = 0

    def add(self, token: int) -> str:
        """Return the text that a token adds."""
        self._window.append(token)
        waiting = len(self._window) - self._num_shown
        if waiting > TRIES and waiting & (waiting - 1):
            return ""  # no character: decoded again whenever twice as many wait, which keeps the time linear
        text = self._decode(self._window)
        if len(text) <= len(self._shown) or text.endswith(HALF):
            return ""
        piece = text[len(self._shown) :]
        self._window = self._window[self._num_shown :]
        self._num_shown, self._shown = len(self._window), self._decode(self._window)
        return piece

    def flush(self) -> str:
        """Return the text of the tokens that have added nothing yet, such as half a character at the end of a row."""
        if self._num_shown == len(self._window):
            return ""
        piece = self._decode(self._window)[len(self._shown) :]
        self._window, self._shown, self._num_shown = [], "", 0
        return piece
