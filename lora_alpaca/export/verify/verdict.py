"""Whether what a server answers is what was trained: a verdict with its evidence, from replies and the served receipt.

    completions (the prompt as text)    tokenizer and weights of the server
    chat (the messages)                 its chat template too

So the completions say whether the weights are right, and the chat, where it alone differs, that the prompt is not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Literal

from lora_alpaca.export.verify.comparison import Comparison, Reply, compare
from lora_alpaca.export.verify.served_receipt import Answer, Probe, ServedReceipt

EXACT = 2e-3  # nats; what another order of the same sums in fp32 changes log-probabilities by, on average
ROUNDING = 0.02  # nats; what 16 bits change them by where that was not measured, see docs/verify.md
SEVERAL = 3  # times what 16 bits change is not called rounding any more
LEAST = 4e-3  # nats, which are always called rounding
NEAR = 1.5  # nats; by which quantised weights move a token, and other weights by more
HALF = 0.5  # of the adapter's effect, above which it is taken to be there
LOWEST = -8.0  # nats, below which log-probabilities count as this
FEWEST = 6  # tokens with which the effect is measured
SHARE = 0.8  # of answers, that make them those of the base

Kind = Literal["equal", "rounding", "prompt", "base", "late", "early", "quantised", "other", "sampling", "nothing"]
Route = Literal["completions", "chat"]


@dataclass(frozen=True)
class Replies:
    """What a server answered to one probe; None is a question that was not asked, or got no answer.

    `ids` is the reply to the prompt's ids, asked where that to the text differs; `again` that to the same question with
    another seed.
    """

    completions: Reply | None = None
    chat: Reply | None = None
    ids: Reply | None = None
    again: Reply | None = None


@dataclass(frozen=True)
class Figures:
    """What the replies of one route have in common with one kind of answers.

    `effect` is how much of what the adapter changes is there, 1 for all of it, None where that cannot be told.
    """

    comparisons: list[Comparison]
    effect: float | None = None

    @property
    def asked(self) -> int:
        """Return the number of replies."""
        return len(self.comparisons)

    @property
    def same(self) -> int:
        """Return the number of replies that differ in nothing but rounding."""
        return sum(one.same for one in self.comparisons)

    @property
    def exact(self) -> bool:
        """Return whether every token is the same."""
        return all(one.gap == 0 for one in self.comparisons)

    @property
    def share(self) -> float:
        """Return the share of the tokens that agree; what follows a near tie is not compared."""
        compared = sum(one.agreed if one.same else one.length for one in self.comparisons)
        return sum(one.agreed for one in self.comparisons) / max(1, compared)

    @property
    def ties(self) -> list[float]:
        """Return by how much less likely what the server took is, where rounding explains it."""
        return [one.gap for one in self.comparisons if one.same and one.gap > 0]

    @property
    def delta(self) -> float | None:
        """Return the mean difference of log-probabilities, None where the server gives none."""
        deltas = [delta for one in self.comparisons for delta in one.deltas]
        return mean(deltas) if deltas else None

    @property
    def gaps(self) -> list[float]:
        """Return by how much less likely what the server took is, where it differs."""
        return [one.gap for one in self.comparisons if not one.same]

    def ending(self) -> Literal["", "late", "early"]:
        """Return how the replies differ if they differ in their ends alone."""
        ends = {one.end for one in self.comparisons if not one.same}
        return ends.pop() if len(ends) == 1 else ""


@dataclass(frozen=True)
class Verdict:
    """What was found: its kind, the figures by route, the probe that shows it best, and what could not be checked."""

    kind: Kind
    tuned: dict[Route, Figures] = field(default_factory=dict)
    plain: dict[Route, Figures] = field(default_factory=dict)
    extra_tokens: dict[Route, list[int]] = field(default_factory=dict)  # of the server's prompts, where it counts them
    shown: tuple[Probe, Route, Reply] | None = None
    unchecked: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Return whether what is served is what was trained."""
        return self.kind in ("equal", "rounding")


def decide(receipt: ServedReceipt, replies: Sequence[Replies], unchecked: Sequence[str] = ()) -> Verdict:
    """Return the verdict on the replies to the probes of a receipt, in their order."""
    pairs = list(zip(receipt.probes, replies, strict=True))
    tuned, plain, extra = {}, {}, {}
    for route in ROUTES:
        asked = [(probe, reply) for probe, one in pairs if (reply := getattr(one, route)) is not None]
        if asked:
            found = [_compared(receipt, reply, probe.tuned) for probe, reply in asked]
            tuned[route] = Figures(found, _effect([(probe, one) for (probe, _), one in zip(asked, found, strict=True)]))
            plain[route] = Figures([_compared(receipt, reply, probe.plain) for probe, reply in asked])
            extra[route] = [
                reply.prompt_tokens - len(probe.prompt_ids) for probe, reply in asked if reply.prompt_tokens
            ]
    kind = _kind(receipt, pairs, tuned, plain, extra)
    said = tuple(unchecked) + tuple(_unchecked(receipt, kind, tuned))
    return Verdict(kind, tuned, plain, extra, _shown(receipt, pairs, kind, tuned), said)


ROUTES: tuple[Route, ...] = ("completions", "chat")
Pairs = list[tuple[Probe, Replies]]


def _compared(receipt: ServedReceipt, reply: Reply, answer: Answer) -> Comparison:
    return compare(reply, answer, receipt.stop_ids, receipt.new_tokens)


def _kind(
    receipt: ServedReceipt,
    pairs: Pairs,
    tuned: dict[Route, Figures],
    plain: dict[Route, Figures],
    extra: dict[Route, list[int]],
) -> Kind:
    if not tuned:
        return "nothing"
    if _samples(receipt, pairs):
        return "sampling"
    first: Route = "completions" if "completions" in tuned else "chat"
    kind = _of_weights(tuned[first], plain[first], _distinct(pairs, first), rounds_by(receipt))
    if first == "chat":
        return "prompt" if kind in ("other", "quantised") and _is_other_prompt(extra["chat"]) else kind
    by_ids = [_compared(receipt, one.ids, probe.tuned) for probe, one in pairs if one.ids is not None]
    if kind in ("other", "quantised") and by_ids and all(one.same for one in by_ids):
        return "prompt"
    if "chat" not in tuned or kind not in ("equal", "rounding"):
        chat_is_right = "chat" in tuned and tuned["chat"].same == tuned["chat"].asked
        return "prompt" if kind in ("other", "quantised") and chat_is_right else kind
    of_chat = tuned["chat"]
    if of_chat.same == of_chat.asked:
        return kind if of_chat.exact else "rounding"
    return of_chat.ending() or "prompt"


def rounds_by(receipt: ServedReceipt) -> float:
    """Return by how many nats log-probabilities may differ, on average, for that to be called rounding."""
    return max(LEAST, SEVERAL * (ROUNDING if receipt.rounding is None else receipt.rounding))


def _of_weights(tuned: Figures, plain: Figures, distinct: list[bool], rounding: float) -> Kind:
    """Return what the replies of one route say; `distinct` are the probes to which base and adapter differ."""
    if tuned.same == tuned.asked:
        delta = tuned.delta or 0.0
        if delta > rounding:
            return "quantised"
        return "equal" if tuned.exact and delta <= EXACT else "rounding"
    telling = [(a, b) for a, b, tells in zip(tuned.comparisons, plain.comparisons, distinct, strict=True) if tells]
    as_base, as_tuned = (sum(pair[number].same for pair in telling) for number in (1, 0))
    if telling and as_base >= SHARE * len(telling) and as_base > as_tuned:
        return "base"
    if ending := tuned.ending():
        return ending
    is_there = tuned.effect is None or tuned.effect > HALF
    return "quantised" if is_there and median(tuned.gaps) < NEAR else "other"


def _effect(found: list[tuple[Probe, Comparison]]) -> float | None:
    """Return how much of the adapter's effect a server has: 1 as trained, 0 as the base; None if it cannot be told.

    It is the slope of what the server changes of the base's log-probabilities over what training has changed.
    """
    pairs = [
        (
            0.0 if theirs == -math.inf else max(theirs, LOWEST) - max(base, LOWEST),  # unlikely, as for the base
            max(place[0].logprob, LOWEST) - max(base, LOWEST),
        )
        for probe, one in found
        for theirs, base, place in zip(one.scores, probe.scores, probe.tuned.places, strict=False)
    ]
    size = sum(changed**2 for _, changed in pairs)
    if len(pairs) < FEWEST or size < len(pairs) * EXACT**2:
        return None
    return sum(served * changed for served, changed in pairs) / size


def _distinct(pairs: Pairs, route: Route) -> list[bool]:
    """Return of every probe that was asked whether base and adapter answer it with different texts."""
    return [probe.tuned.text.strip() != probe.plain.text.strip() for probe, one in pairs if getattr(one, route)]


def _samples(receipt: ServedReceipt, pairs: Pairs) -> bool:
    """Return whether a server answers the same question otherwise, by more than rounding."""
    for probe, one in pairs:
        before = one.completions or one.chat
        if before is None or one.again is None or before.text.strip() == one.again.text.strip():
            continue
        if not all(_compared(receipt, reply, probe.tuned).same for reply in (before, one.again)):
            return True
    return False


def _is_other_prompt(extra: list[int]) -> bool:
    return bool(extra) and all(extra)


def _shown(
    receipt: ServedReceipt, pairs: Pairs, kind: Kind, tuned: dict[Route, Figures]
) -> tuple[Probe, Route, Reply] | None:
    """Return the reply that differs first, in the route that decided."""
    order: list[Route] = ["chat", "completions"] if kind == "prompt" else ["completions", "chat"]
    for route in order:
        for probe, one in pairs:
            reply = getattr(one, route)
            if reply is not None and not _compared(receipt, reply, probe.tuned).same:
                return probe, route, reply
    return None


def _unchecked(receipt: ServedReceipt, kind: Kind, tuned: dict[Route, Figures]) -> list[str]:
    """Return what the replies cannot show."""
    found = []
    if tuned and not any(one.scores for figures in tuned.values() for one in figures.comparisons):
        found.append("log-probabilities, which the server does not give: quantising that changes no token is not seen")
    if tuned and all(probe.tuned.ends is None for probe in receipt.probes):
        found.append(f"where answers end: none of the model's own ends within {receipt.new_tokens} tokens")
    return found
