"""A reply of a server, held against an answer of the served receipt, token by token.

A server gives text, and log-probabilities if it is asked nicely; ids it does not give. White space around an answer and
half a character at its end count as nothing, since servers differ in them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lora_alpaca.data.detokenization import HALF
from lora_alpaca.export.verify.served_receipt import Answer, Token

TIE = 0.15  # nats; two tokens that are nearer to each other change places by rounding, see docs/verify.md
_BACK = 2  # places: a longer token that begins like ours differs from it in text only later


class Said(NamedTuple):
    """A token of a server with its log-probability, and the likeliest ones at its place."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...] = ()


class Reply(NamedTuple):
    """What a server answered: the text, why it ended, and, where it gives them, its tokens with log-probabilities."""

    text: str
    finish: str = ""  # "stop", "length", or a server's own word
    tokens: tuple["Said", ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Comparison:
    """How far a reply goes with an answer.

    `agreed` of the answer's `length` tokens are the same, its end token included. `gap` is by how much, in nats, the
    token that the server took at the first difference is less likely than ours; infinite if it is not among our
    likeliest, 0 where nothing differs. `end` says of a difference that it is one of ending alone. `goes_on_as_ours` is
    whether a late reply says what our model, too, would say behind its end token. `scores` are the log-probabilities
    that the server gives our tokens, those that agree and the one behind them, if it tells, which is -infinity where
    that is not among its likeliest; `deltas` are by how much
    they differ from ours where the tokens agree.
    """

    agreed: int
    length: int
    gap: float = 0.0
    end: Literal["", "late", "early"] = ""
    goes_on_as_ours: bool = False
    scores: list[float] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Return whether nothing differs but what rounding explains."""
        return self.gap < TIE


def compare(reply: Reply, answer: Answer, stop_ids: list[int], new_tokens: int) -> Comparison:
    """Return how far a reply goes with an answer."""
    texts = [text.lstrip() for text in answer.texts]
    said = reply.text.strip().rstrip(HALF)
    last = len(answer.places) if answer.ends is None else answer.ends
    place = next((place for place in range(last) if not _begins(said, texts[place + 1])), last)
    length = last + (answer.ends is not None)
    scores = _scores(reply, answer, place)
    deltas = [abs(score - tokens[0].logprob) for score, tokens in zip(scores[:place], answer.places, strict=False)]
    if place < last:
        rest = said[len(texts[place]) :]
        if rest:
            return Comparison(place, length, _gap_of_text(answer, texts, said, place), scores=scores, deltas=deltas)
        if reply.finish == "length":  # the server counts tokens otherwise, or allows fewer
            return Comparison(place, place, scores=scores, deltas=deltas)
        gap = _gap(answer.places[place], lambda token: token.id in stop_ids)
        return Comparison(place, length, gap, "early", scores=scores, deltas=deltas)
    if answer.ends is None:
        return Comparison(place, length, scores=scores, deltas=deltas)
    goes_on = len(said) > len(texts[last].rstrip())
    made = reply.completion_tokens
    unseen = reply.finish == "length" and last + 1 < new_tokens and (made is None or made > last + 1)
    if not goes_on and not unseen:
        return Comparison(length, length, scores=scores, deltas=deltas)
    ours = texts[-1].strip()
    as_ours = said.startswith(ours) or ours.startswith(said)
    gap = _gap_of_text(answer, texts, said, last) if goes_on and not as_ours else math.inf
    return Comparison(place, length, gap, "late", as_ours, scores, deltas)


def _begins(said: str, text: str) -> bool:
    return said.startswith(text) or said == text.rstrip()


def _gap_of_text(answer: Answer, texts: list[str], said: str, place: int) -> float:
    """Return by how much less likely than ours the likeliest token is with which the server's text goes on."""
    gaps = []
    for near in range(max(0, place - _BACK), place + 1):
        rest = said[len(texts[near]) :]

        def fits(token: Token, near: int = near, rest: str = rest) -> bool:
            text = token.text if texts[near] else token.text.lstrip()
            return bool(text.strip(f" {HALF}")) and rest.startswith(text.rstrip(HALF))

        gaps.append(_gap(answer.places[near], fits))
    return min(gaps)


def _gap(place: list[Token], taken: Callable[[Token], bool]) -> float:
    others = [token.logprob for token in place[1:] if taken(token)]
    return place[0].logprob - max(others) if others else math.inf


def _scores(reply: Reply, answer: Answer, agreed: int) -> list[float]:
    """Return the log-probabilities that the server gives our tokens, as far as its tokens are ours, and one more."""
    found: list[float] = []
    for said, place in zip(reply.tokens, answer.places, strict=False):
        ours = place[0].text
        if len(found) == agreed:
            same = [value for text, value in said.likeliest if _is_same(text, ours)]
            return found + (same[:1] if same else [-math.inf] * bool(said.likeliest))
        if not _is_same(said.text, ours):
            break
        found.append(said.logprob)
    return found


def _is_same(theirs: str, ours: str) -> bool:
    """Return whether two tokens may be the same; of half a character, a server has its own writing."""
    if ours.strip(HALF) != ours or HALF in theirs or theirs.startswith("bytes:"):
        return True
    return theirs.strip() == ours.strip() or not theirs or not ours
