"""Training rows as token ids and learned spans, kept flat: four bytes a token, in memory or mapped from a file."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

IGNORED = -100  # the label of a token that is not learned, as torch's cross-entropy has it
Span = tuple[int, int]  # of learned tokens: from the first to behind the last


@dataclass(slots=True, eq=False)
class Example:
    """A row: its token ids, int32 [tokens], the spans of them that are learned, and the positions of its end tokens.

    Spans are in order, not empty, and do not overlap. Only preparation needs `ends`; `Examples` does not keep them.
    `place` is that of the first token among all tokens of a run, where these are counted; it tells no row from another.
    """

    ids: np.ndarray
    spans: list[Span]
    ends: list[int] = field(default_factory=list)
    place: int | None = None

    def __post_init__(self) -> None:
        """Take the ids of a list too."""
        self.ids = np.asarray(self.ids, np.int32)

    def __eq__(self, other: object) -> bool:
        """Return whether another row has the same ids, spans and ends."""
        if not isinstance(other, Example):
            return NotImplemented
        return (self.spans, self.ends) == (other.spans, other.ends) and np.array_equal(self.ids, other.ids)

    @property
    def labels(self) -> list[int]:
        """Return the id of every token that is learned, and -100 for the others."""
        labels: list[int] = np.where(self.mask(), self.ids, IGNORED).tolist()
        return labels

    def mask(self) -> np.ndarray:
        """Return for every token whether it is learned, bool [tokens]."""
        learned = np.zeros(len(self.ids), bool)
        for first, last in self.spans:
            learned[first:last] = True
        return learned

    def num_labels(self) -> int:
        """Return the number of predictions with a label: the learned tokens, without the first token of the row."""
        return sum(last - max(first, 1) for first, last in self.spans)

    def cut(self, length: int) -> "Example":
        """Return the first `length` tokens, without a prompt at the end that has lost its answer."""
        spans = [(first, min(last, length)) for first, last in self.spans if first < length]
        length = spans[-1][1] if spans else length
        return Example(self.ids[:length], spans, [end for end in self.ends if end < length])


def label_positions(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the position of every label of some examples, as int64 [labels] each, in order.

    The first token of a row is no label: nothing comes before it that could predict it.
    """
    spans = [(row, max(first, 1), last) for row, example in enumerate(examples) for first, last in example.spans]
    row, first, last = np.array(spans, np.int64).reshape(-1, 3).T
    lengths = last - first
    before = np.cumsum(lengths) - lengths  # labels of the earlier spans
    return np.repeat(row, lengths), np.arange(lengths.sum()) + np.repeat(first - before, lengths)


class Examples(Sequence[Example]):
    """Many examples in flat arrays. `examples[n]` is an Example whose ids are a part of them, not a copy.

    `ids` int32 [tokens] and `starts` int64 [rows + 1] are the rows; `spans` int32 [spans, 2] and `first_spans`
    int64 [rows + 1] are the learned spans of each row, as positions in the row. `numbers` int32 [rows] says which row
    of the data each was made of, from 0 over all its files; of a block of documents, the one that it begins in.
    """

    TOKENS = (("ids", np.int32), ("starts", np.int64), ("spans", np.int32), ("first_spans", np.int64))
    ARRAYS = (*TOKENS, ("numbers", np.int32))

    def __init__(
        self, ids: np.ndarray, starts: np.ndarray, spans: np.ndarray, first_spans: np.ndarray, numbers: np.ndarray
    ):
        self.ids, self.starts, self.spans, self.first_spans = ids, starts, spans.reshape(-1, 2), first_spans
        self.numbers = numbers
        self.first_place: int | None = None  # of the first token, among all tokens of a run

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, row: int) -> Example: ...
    @overload
    def __getitem__(self, row: slice) -> list[Example]: ...
    def __getitem__(self, row: int | slice) -> Example | list[Example]:
        """Return one row as an Example, or a slice as a list of them."""
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # negative numbers, and IndexError
        spans = self.spans[self.first_spans[row] : self.first_spans[row + 1]].tolist()
        ids = self.ids[self.starts[row] : self.starts[row + 1]]
        place = None if self.first_place is None else self.first_place + int(self.starts[row])
        return Example(ids, [(first, last) for first, last in spans], place=place)

    def __iter__(self) -> Iterator[Example]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of every row, as int64 [rows]."""
        return np.diff(self.starts)

    def is_whole(self) -> bool:
        """Return whether the arrays fit together: False for files that were cut short."""
        rows = len(self.first_spans) == len(self.starts) == len(self.numbers) + 1
        return bool(rows and self.starts[-1] == len(self.ids) and self.first_spans[-1] == len(self.spans))

    def digest(self) -> str:
        """Return a sha256 of all tokens and of which are learned."""
        found = hashlib.sha256()
        for key, _ in self.TOKENS:
            found.update(np.ascontiguousarray(getattr(self, key)).tobytes())
        return found.hexdigest()

    def save(self, folder: Path, name: str) -> None:
        """Write the arrays to `folder/name.ids`, `.starts`, and so on."""
        for key, _ in self.ARRAYS:
            getattr(self, key).tofile(folder / f"{name}.{key}")

    @classmethod
    def mapped(cls, folder: Path, name: str) -> "Examples":
        """Return what `save` wrote, mapped from the files: tokens are read when they are needed."""
        return cls(*(_map(folder / f"{name}.{key}", dtype) for key, dtype in cls.ARRAYS))


def _map(path: Path, dtype: Any) -> np.ndarray:
    """Return a file as an array. A plain view of the memory map: the subclass `memmap` is ten times slower to slice."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)


class Builder:
    """Takes rows one by one and gives an `Examples`. With `block`, rows are joined and cut to blocks of that length."""

    def __init__(self, block: int = 0):
        self._block = block
        self._ids, self._starts = array("i"), array("q", [0])
        self._spans, self._first_spans = array("i"), array("q", [0])
        self._numbers, self._number = array("i"), 0  # that of the example under way

    def add(self, row: Example, number: int = 0) -> None:
        """Add an example of the row of a number; in blocks, all of it is learned."""
        if len(self._ids) == self._starts[-1]:
            self._number = number
        self._ids.frombytes(row.ids.tobytes())
        if self._block:
            while len(self._ids) - self._starts[-1] >= self._block:
                self._end(self._starts[-1] + self._block, [(0, self._block)])
                self._number = number
        else:
            self._end(len(self._ids), row.spans)

    def _end(self, stop: int, spans: Sequence[Span]) -> None:
        self._starts.append(stop)
        self._numbers.append(self._number)
        for span in spans:
            self._spans.extend(span)
        self._first_spans.append(len(self._spans) // 2)

    def build(self) -> Examples:
        """Return the examples; the rest of the last block is a block of its own."""
        left = len(self._ids) - self._starts[-1]
        if left:
            self._end(len(self._ids), [(0, left)])
        made = (self._ids, self._starts, self._spans, self._first_spans, self._numbers)
        arrays = zip(made, Examples.ARRAYS, strict=True)
        return Examples(
            *(np.frombuffer(values, dtype) if values else np.empty(0, dtype) for values, (_, dtype) in arrays)
        )
