"""Rows of an optimizer batch become packs: one row of tokens each, without padding, shared beginnings held once.

The rows of a pack form a tree. What several rows begin with is a segment that all of them share, and every row is a
path from the root:

    Below is ... ### Instruction:\n -+- Name a colour. ... Blue.        3 rows of 40 + 20 tokens
                                     +- Add 2 and 3. ... 5.             in a pack of 40 + 3 x 20
                                     +- Say hello. ... Hello!

A token sees the tokens before it on its own path, and nothing else; its position is its place on that path. So every
row is computed as if it stood alone, and the work on a beginning is done once for all rows that have it. Packs depend
on nothing but the rows, the token budget and whether to share: not on ranks, devices or chance.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from lora_alpaca.data.examples import IGNORED, Example

LEAST_SAVED = 4  # tokens that a shared segment must save: a segment more is an attention call more in every layer


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens `start` to `stop` of a pack; `above` are the numbers of the segments before it on its path."""

    start: int
    stop: int
    above: tuple[int, ...]


@dataclass
class PackedBatch:
    """One row of N tokens, and the T predictions to score in it."""

    input_ids: torch.Tensor  # [1, N]
    positions: torch.Tensor  # [1, N]  the place of each token in its own row
    segments: list[Segment]
    places: torch.Tensor  # [T]  where in the pack a prediction is made
    labels: torch.Tensor  # [T]  the token id that should come next
    weights: torch.Tensor  # [T]  the number of rows that make this prediction
    longest: int  # tokens of the longest row
    masks: dict[Any, Any] = field(default_factory=dict)  # what attention derives from the segments, once a pack

    def subtree_ends(self) -> torch.Tensor:
        """Return [N]: token k is seen by the tokens from k up to, not including, the k-th number."""
        ends = [segment.stop for segment in self.segments]
        for segment in self.segments:
            for number in segment.above:
                ends[number] = segment.stop
        lengths = torch.tensor([segment.stop - segment.start for segment in self.segments])
        return torch.tensor(ends).repeat_interleave(lengths).to(self.input_ids.device)


def pack(examples: Sequence[Example], share: bool = True, device: torch.device | str = "cpu") -> PackedBatch:
    """Return the pack of some examples; each must have a prediction to score."""
    rows = [_needed(example) for example in examples]
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    paths: list[list[int]] = [[] for _ in rows]  # where in the pack the tokens of each row are

    def put(members: Sequence[int], start: int, stop: int, above: tuple[int, ...]) -> tuple[int, ...]:
        """Append one segment, the tokens `start` to `stop` of all its members; return the path with it."""
        if start == stop:
            return above
        begin = len(ids)
        ids.extend(rows[members[0]][start:stop])
        positions.extend(range(start, stop))
        segments.append(Segment(begin, len(ids), above))
        for member in members:
            paths[member].extend(range(begin, len(ids)))
        return (*above, len(segments) - 1)

    def grow(members: Sequence[int], start: int, above: tuple[int, ...]) -> None:
        """Append the subtree of rows, in order, that agree in their first `start` tokens."""
        stop = _shared(rows[members[0]], rows[members[-1]])  # in order: what the first and the last share, all share
        if (stop - start) * (len(members) - 1) >= LEAST_SAVED:
            above = put(members, start, stop, above)
            start = stop
        for following, branch in groupby(members, key=lambda member: rows[member][stop : stop + 1]):
            alike = list(branch)
            if following and len(alike) > 1:
                grow(alike, start, above)
            else:  # rows that end here, or a row that goes on alone
                for member in alike:
                    put([member], start, len(rows[member]), above)

    if share:
        grow(sorted(range(len(rows)), key=rows.__getitem__), 0, ())
    else:
        for row in range(len(rows)):
            put([row], 0, len(rows[row]), ())

    scored: Counter[tuple[int, int]] = Counter()
    for example, path in zip(examples, paths, strict=True):
        following = zip(path, example.labels[1:], strict=False)  # the prediction at t is scored on the label at t + 1
        scored.update((place, label) for place, label in following if label != IGNORED)
    places, labels = zip(*sorted(scored), strict=True)
    weights = [scored[prediction] for prediction in sorted(scored)]
    return PackedBatch(
        input_ids=torch.tensor([ids], device=device),
        positions=torch.tensor([positions], device=device),
        segments=segments,
        places=torch.tensor(places, device=device),
        labels=torch.tensor(labels, device=device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        longest=max(len(row) for row in rows),
    )


def packs(examples: Sequence[Example], token_budget: int, share: bool = True) -> list[list[int]]:
    """Return the numbers of the examples in each pack: as few packs as the budget allows, of like size.

    Rows with the same beginning become neighbours, and neighbours go into one pack. A row longer than the budget has
    a pack for itself; a row without a prediction has no place in any.
    """
    rows = {number: _needed(example) for number, example in enumerate(examples) if example.scored()}
    order = sorted(rows, key=rows.__getitem__) if share else list(rows)
    lengths = [len(rows[number]) for number in order]
    added = list(lengths)  # tokens that a row adds, at most, to the pack of the row before it
    for place in range(1, len(order)) if share else ():
        shared = _shared(rows[order[place - 1]], rows[order[place]])
        added[place] -= max(0, shared - LEAST_SAVED + 1)  # what is not worth a segment stays with each row

    def filled(capacity: int) -> list[list[int]]:
        parts: list[list[int]] = []
        size = capacity
        for number, length, more in zip(order, lengths, added, strict=True):
            if size + more > capacity:
                parts.append([])
                size, more = 0, length
            parts[-1].append(number)
            size += more
        return parts

    fewest = len(filled(token_budget))  # and the lowest capacity that needs no more packs makes them alike
    return filled(bisect_left(range(token_budget), True, key=lambda capacity: len(filled(capacity)) <= fewest))


def _needed(example: Example) -> list[int]:
    """Return the ids that a row feeds: up to the last prediction that is scored. Nothing depends on what follows."""
    last = max(place for place, label in enumerate(example.labels) if label != IGNORED)
    return example.input_ids[:last]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two rows have in common at their beginning."""
    apart = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(apart, min(len(one), len(other)))
