"""Rows of an optimizer batch become packs: one row of tokens each, without padding, shared beginnings only once.

The rows of a pack form a tree. A beginning that several rows have is a segment that they share, and every row is a
path from the root:

    Below is ... ### Instruction:\n -+- Name a colour. ... Blue.        3 rows of 40 + 20 tokens
                                     +- Add 2 and 3. ... 5.             in a pack of 40 + 3 x 20
                                     +- Say hello. ... Hello!

A token sees the tokens before it on its own path, and nothing else; its position counts along that path. So every row
is computed as if it were alone, and the work on a beginning is done once for all rows that have it. Which rows are in
a pack depends on nothing but the rows, the token budget, whether to share, and the number of ranks: not on devices or
chance. Where a new length costs more than a few tokens, a pack is filled up to the next multiple.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from lora_alpaca.data.examples import Example, label_positions
from lora_alpaca.engine.batches import Batch

COMPILED_LENGTHS = 32  # tokens between two lengths of a pack, where products are compiled for each
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
    token_places: np.ndarray | None  # [N]  of each token among all tokens of a run, where its rows know theirs
    of_rows: list[np.ndarray]  # for each row, which tokens of the pack it reads, in order
    masks: dict[Any, Any] = field(default_factory=dict)  # made from the segments by attention, once for all layers

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model; it passes `pack` to its attention."""
        return {"input_ids": self.input_ids, "position_ids": self.positions, "pack": self}

    def places(self) -> list[slice]:
        """Return where each row is among the inputs. Raises ValueError where rows share their beginnings."""
        if len(self.segments) != len(self.rows):
            raise ValueError("rows that share their beginnings have no places of their own")
        places = zip(self.segments, self.of_rows, strict=True)
        return [slice(segment.start, segment.start + len(tokens)) for segment, tokens in places]

    def subtree_ends(self) -> torch.Tensor:
        """Return [N], on the CPU: token k is seen by the tokens from k up to, not including, the k-th number."""
        ends = [segment.stop for segment in self.segments]
        for segment in self.segments:
            for number in segment.above:
                ends[number] = segment.stop
        lengths = torch.tensor([segment.stop - segment.start for segment in self.segments])
        return torch.tensor(ends).repeat_interleave(lengths)


def length_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Return of what the tokens of a pack are a multiple: a CPU in 16 bits compiles products for every length."""
    return COMPILED_LENGTHS if device.type == "cpu" and dtype != torch.float32 else 1


def pack(
    examples: Sequence[Example], share: bool = True, device: torch.device | str = "cpu", multiple: int = 1
) -> PackedBatch:
    """Return the pack of some examples; each must have a label to predict.

    Its tokens are a multiple of `multiple`: the last row goes on with copies of its last token, which nothing reads.
    """
    read = [example.ids[: _last_label(example) + 1] for example in examples]
    rows = [ids[:-1] for ids in read]  # the last label is predicted and not fed
    order, shared = _in_order(rows, share)
    starts = np.cumsum([0, *map(len, read)])  # of each row in all of them, end to end
    index = np.empty(starts[-1], np.int64)  # in the pack, of every token of all rows
    count = np.arange(starts[-1])
    segments: list[Segment] = []
    ids, positions, places = [], [], []
    for members, start, stop, above in _tree([len(rows[row]) for row in order], shared):
        begin = segments[-1].stop if segments else 0
        segments.append(Segment(begin, begin + stop - start, above))
        ids.append(rows[order[members[0]]][start:stop])
        positions.append(count[start:stop])
        if (place := examples[order[members[0]]].place) is not None:
            places.append(place + count[start:stop])
        for member in members:
            first = starts[order[member]]
            index[first + start : first + stop] = count[begin : begin + stop - start]
    if filler := -segments[-1].stop % multiple:  # the last segment is above no other one
        segments[-1] = replace(segments[-1], stop=segments[-1].stop + filler)
        for parts in (ids, positions, places):
            parts[-1:] = [np.pad(one, (0, filler), "edge") for one in parts[-1:]]

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
        token_places=np.concatenate(places) if len(places) == len(segments) else None,
        of_rows=[index[start : start + len(row)] for start, row in zip(starts, rows, strict=False)],
    )


def packs(examples: Sequence[Example], token_budget: int, share: bool = True) -> list[list[int]]:
    """Return the numbers of the examples in each pack: as few packs as the budget allows, of similar size.

    Rows with the same beginning become neighbours, and neighbours go into one pack. A row longer than the budget has
    a pack of its own; a row without a label to predict is in no pack.
    """
    return [rows for rows, _ in _sized_packs(examples, token_budget, share, 1)]


def shares(examples: Sequence[Example], token_budget: int, share: bool, ranks: int) -> list[list[list[int]]]:
    """Return the packs of each rank: what `packs` returns, but as many as are a multiple of the ranks, dealt out."""
    found = _sized_packs(examples, token_budget, share, ranks)
    return [[found[number][0] for number in numbers] for numbers in dealt([size for _, size in found], ranks)]


def _sized_packs(
    examples: Sequence[Example], token_budget: int, share: bool, multiple: int
) -> list[tuple[list[int], int]]:
    """Return packs, each with its tokens at most; their number is a multiple, where there are rows enough."""
    numbers = [number for number, example in enumerate(examples) if _last_label(example) > 0]
    rows = [examples[number].ids[: _last_label(examples[number])] for number in numbers]
    order, shared = _in_order(rows, share)
    lengths = [len(rows[row]) for row in order]
    # tokens that a row adds, at most, to the pack of the row before it; what is not worth a segment is not shared
    added = [length - max(0, common - LEAST_SAVED + 1) for length, common in zip(lengths, shared, strict=True)]

    def filled(capacity: int) -> list[tuple[list[int], int]]:
        parts: list[list[int]] = []
        sizes: list[int] = []
        size = capacity
        for row, length, more in zip(order, lengths, added, strict=True):
            if size + more > capacity:
                parts.append([])
                sizes.append(0)
                size, more = 0, length
            parts[-1].append(numbers[row])
            size += more
            sizes[-1] = size
        return list(zip(parts, sizes, strict=True))

    fewest = math.ceil(len(filled(token_budget)) / multiple) * multiple
    # the lowest capacity that needs no more packs makes them alike
    return filled(bisect_left(range(token_budget), True, key=lambda capacity: len(filled(capacity)) <= fewest))


def dealt(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the numbers of the packs of each rank, given the tokens of each pack: so that ranks have equal shares.

    The largest that are left go to ranks in turn, the largest of them to the rank that has least. So no rank has more
    than one pack more than another, and what ranks compute at the same time is of like size. One rank has all, in
    their order.
    """
    if ranks == 1:
        return [list(range(len(sizes)))]
    shares, loads = [list[int]() for _ in range(ranks)], [0] * ranks
    by_size = sorted(range(len(sizes)), key=lambda number: (-sizes[number], number))
    for first in range(0, len(by_size), ranks):
        for number, rank in zip(
            by_size[first : first + ranks], sorted(range(ranks), key=loads.__getitem__), strict=False
        ):
            shares[rank].append(number)
            loads[rank] += sizes[number]
    return shares


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
