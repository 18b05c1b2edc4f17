"""Keys and values of texts that were answered, for prompts that begin with the same tokens."""

from collections import OrderedDict
from collections.abc import Sequence

from lora_alpaca.inference.scheduler.cache import Cache, Saved, common

LEAST = 8  # tokens that are worth a copy


class Prefixes:
    """What finished answers leave behind, up to a number of tokens; what was used longest ago goes first."""

    def __init__(self, most_tokens: int):
        self.most_tokens, self.tokens = most_tokens, 0
        self._texts: OrderedDict[tuple[int, ...], Saved] = OrderedDict()

    def longest(self, ids: Sequence[int]) -> tuple[int, Saved | None]:
        """Return with how many tokens of a prompt a saved text begins, at most all but the last, and that text."""
        most, found = LEAST - 1, None
        for text in self._texts:
            if (shared := min(common(text, ids), len(ids) - 1)) > most:
                most, found = shared, text
        if found is None:
            return 0, None
        self._texts.move_to_end(found)
        return most, self._texts[found]

    def add(self, ids: Sequence[int], cache: Cache, row: int) -> None:
        """Save the keys and values of a text that is in a row, unless a longer one holds them already."""
        text = tuple(ids)
        if not LEAST < len(text) <= self.most_tokens:
            return
        for other in list(self._texts):
            if other[: len(text)] == text:
                self._texts.move_to_end(other)
                return
            if text[: len(other)] == other:
                self._drop(other)
        while self.tokens + len(text) > self.most_tokens:
            self._drop(next(iter(self._texts)))
        self._texts[text] = cache.save(row, len(text))
        self.tokens += len(text)

    def clear(self) -> None:
        """Forget all texts."""
        self._texts.clear()
        self.tokens = 0

    def _drop(self, text: tuple[int, ...]) -> None:
        del self._texts[text]
        self.tokens -= len(text)
