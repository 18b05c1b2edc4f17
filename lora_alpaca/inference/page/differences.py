"""What differs between two texts, word by word."""

import re
from difflib import SequenceMatcher

Part = tuple[str, bool]  # a stretch of a text, and whether the other one lacks it
LONGEST = 3000  # words that are compared; the time grows with their square
_WORDS = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")


def marked(left: str, right: str) -> tuple[list[Part], list[Part]]:
    """Return the parts of two texts, those that the other one lacks marked; of very long texts nothing is marked.

    White space belongs to the word behind it, and makes no difference.
    """
    texts = _WORDS.findall(left), _WORDS.findall(right)
    if max(map(len, texts)) > LONGEST:
        return [(left, False)], [(right, False)]
    words = [[text.strip() for text in side] for side in texts]
    parts: tuple[list[Part], list[Part]] = [], []
    for kind, *spans in SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes():
        for side, own, (start, end) in zip(parts, texts, (spans[:2], spans[2:]), strict=True):
            stretch = "".join(own[start:end])
            word = stretch.lstrip()
            space = stretch[: len(stretch) - len(word)]
            side += [(text, found) for text, found in ((space, False), (word, kind != "equal")) if text]
    return parts
