"""The text of single tokens, as each stands in the middle of a text."""

import re
from functools import cached_property, lru_cache
from typing import Any

from lora_alpaca.data.detokenization import HALF

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece names a byte


class TokenTexts:
    """The texts of a tokenizer's tokens, by their ids. `anchor` is an id behind which a token keeps its space."""

    def __init__(self, tokenizer: Any, anchor: int):
        self._tokenizer, self._anchor = tokenizer, anchor
        self.text = lru_cache(maxsize=100_000)(self._text)

    def _text(self, number: int) -> str:
        """Return the text of a token; of a control token its name, of half a character a mark."""
        return self._decode([self._anchor, number])[len(self._before) :]

    def bytes(self, number: int) -> bytes | None:
        """Return the bytes of a token, None where they are not known."""
        text = self.text(number)
        if HALF not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(number))
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return bytes(_LETTERS[letter] for letter in piece) if set(piece) <= _LETTERS.keys() else None

    @cached_property
    def _before(self) -> str:
        return self._decode([self._anchor])

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _letters() -> dict[str, int]:
    """Return the bytes by the letters that byte-level tokenizers write for them, printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_LETTERS = _letters()
