"""Rows of an optimizer batch become packs: one row of tokens each, without padding, shared beginnings only once.

The rows of a pack form a tree. A beginning that several rows have is a segment that they share, and every row is a
path from the root:

    Below is ... ### Instruction:\n -+- Name a colour. ... Blue.        3 rows of 40 + 20 tokens
                                     +- Add 2 and 3. ... 5.             in a pack of 40 + 3 x 20
                                     +- Say hello. ... Hello!

A token sees the tokens before it on its own path, and nothing else; its position counts along that path. So every row
is computed as if it were alone, and the work on a beginning is done once for all rows that have it. Packs depend on
nothing but the rows, the token budget and whether to share: not on ranks, devices or chance.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from lora_alpaca.data.examples import Example, label_positions
from lora_alpaca.engine.batches import Batch

LEAST_SAVED = 4  # tokens that a shared segment must save: a segment more is an attention call more in every layer


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens `start` to `stop` of a pack; `above` are the numbers of the segments before it on its path."""

    start: int
    stop: int
    above: tuple[int, ...]


@dataclass
class PackedBatch(Batch):
    """Rows as one row of N tokens: `input_ids` is [1, N]."""

    positions: torch.Tensor  # [1, N]  of each token in its own row
    segments: list[Segment]
    longest: int  # tokens of the longest row
    masks: dict[Any, Any] = field(default_factory=dict)  # made from the segments by attention, once for all layers

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model; it passes `pack` to its attention."""
        return {"input_ids": self.input_ids, "position_ids": self.positions, "pack": self}

    def subtree_ends(self) -> torch.Tensor:
        """Return [N]: token k is seen by the tokens from k up to, not including, the k-th number."""
        ends = [segment.stop for segment in self.segments]
        for segment in self.segments:
            for number in segment.above:
                ends[number] = segment.stop
        lengths = torch.tensor([segment.stop - segment.start for segment in self.segments])
        return torch.tensor(ends).repeat_interleave(lengths).to(self.input_ids.device)


def pack(examples: Sequence[Example], share: bool = True, device: torch.device | str = "cpu") -> PackedBatch:
    """Return the pack of some examples; each must have a label to predict."""
    read = [example.ids[: _last_label(example) + 1] for example in examples]
    rows = [ids[:-1] for ids in read]  # the last label is predicted and not fed
    order, shared = _in_order(rows, share)
    starts = np.cumsum([0, *map(len, read)])  # of each row in all of them, end to end
    index = np.empty(starts[-1], np.int64)  # in the pack, of every token of all rows
    count = np.arange(starts[-1])
    segments: list[Segment] = []
    ids, positions = [], []
    for members, start, stop, above in _tree([len(rows[row]) for row in order], shared):
        begin = segments[-1].stop if segments else 0
        segments.append(Segment(begin, begin + stop - start, above))
        ids.append(rows[order[members[0]]][start:stop])
        positions.append(count[start:stop])
        for member in members:
            first = starts[order[member]]
            index[first + start : first + stop] = count[begin : begin + stop - start]

    row, position = label_positions(examples)
    label = starts[row] + position
    labels = np.concatenate(read)[label].astype(np.int64)
    vocabulary = labels.max() + 1  # makes one number of a prediction, which is a pair of index and label
    predictions, _, prediction, weights = np.unique(  # with the index it sorts by merging: the rows are sorted runs
        index[label - 1] * vocabulary + labels, return_index=True, return_inverse=True, return_counts=True
    )
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(ids, dtype=np.int64))[None].to(device),
        positions=torch.from_numpy(np.concatenate(positions))[None].to(device),
        indices=torch.from_numpy(predictions // vocabulary).to(device),
        labels=torch.from_numpy(predictions % vocabulary).to(device),
        weights=torch.from_numpy(weights.astype(np.float32)).to(device),
        row_index=torch.from_numpy(row),
        prediction_index=torch.from_numpy(prediction),
        rows=list(range(len(examples))),
        segments=segments,
        longest=max(map(len, rows)),
    )


def packs(examples: Sequence[Example], token_budget: int, share: bool = True) -> list[list[int]]:
    """Return the numbers of the examples in each pack: as few packs as the budget allows, of similar size.

    Rows with the same beginning become neighbours, and neighbours go into one pack. A row longer than the budget has
    a pack of its own; a row without a label to predict is in no pack.
    """
    numbers = [number for number, example in enumerate(examples) if _last_label(example) > 0]
    rows = [examples[number].ids[: _last_label(examples[number])] for number in numbers]
    order, shared = _in_order(rows, share)
    lengths = [len(rows[row]) for row in order]
    # tokens that a row adds, at most, to the pack of the row before it; what is not worth a segment is not shared
    added = [length - max(0, common - LEAST_SAVED + 1) for length, common in zip(lengths, shared, strict=True)]

    def filled(capacity: int) -> list[list[int]]:
        parts: list[list[int]] = []
        size = capacity
        for row, length, more in zip(order, lengths, added, strict=True):
            if size + more > capacity:
                parts.append([])
                size, more = 0, length
            parts[-1].append(numbers[row])
            size += more
        return parts

    fewest = len(filled(token_budget))  # and the lowest capacity that needs no more packs makes them alike
    return filled(bisect_left(range(token_budget), True, key=lambda capacity: len(filled(capacity)) <= fewest))


def _last_label(example: Example) -> int:
    """Return the position of the last label; no token behind it is needed. 0 where nothing is predicted."""
    return example.spans[-1][1] - 1 if example.spans else 0


def _in_order(rows: Sequence[np.ndarray], share: bool) -> tuple[list[int], list[int]]:
    """Return the numbers of rows so that like beginnings are neighbours, and the ids each shares with the one before.

    Where nothing is to be shared, the order is that of the rows.
    """
    if not share:
        return list(range(len(rows))), [0] * len(rows)
    keys = [row.astype(">u4").tobytes() for row in rows]  # bytes compare as the ids do, and fast
    order = sorted(range(len(rows)), key=keys.__getitem__)
    return order, [0, *(_shared(rows[one], rows[other]) for one, other in pairwise(order))][: len(rows)]


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many ids two rows have in common at their beginning."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length


def _tree(lengths: Sequence[int], shared: Sequence[int]) -> Iterator[tuple[range, int, int, tuple[int, ...]]]:
    """Yield the segments of rows in order: the rows that have it, its first token and the end, the segments above it.

    `shared` are the tokens that each row has in common with the one before; in order, what neighbours share, all
    between them share.
    """
    count = 0
    branches: list[tuple[int, int, int, tuple[int, ...]]] = [(0, len(lengths), 0, ())]
    while branches:
        first, last, start, above = branches.pop()
        alone = last - first == 1
        stop = lengths[first] if alone else min(shared[first + 1 : last])
        if start < stop if alone else (stop - start) * (last - first - 1) >= LEAST_SAVED:
            yield range(first, last), start, stop, above
            start, above, count = stop, (*above, count), count + 1
        if not alone:
            cuts = [first, *(row for row in range(first + 1, last) if shared[row] == stop), last]
            branches += [(*branch, start, above) for branch in reversed(list(pairwise(cuts)))]
