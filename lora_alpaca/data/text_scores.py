"""Scores of a text by itself: its words, and how much of it repeats what it said before."""

import re

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
SIZE = 4  # words that are repeated, for `repetition`


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, of any script; of scripts without spaces, the characters."""
    return _WORDS.findall(text.lower())


def repetition(text: str) -> float:
    """Return the share of the text's runs of four words that stood in it before; 0 for fewer than five words."""
    found = words(text)
    runs = [tuple(found[first : first + SIZE]) for first in range(len(found) - SIZE + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
