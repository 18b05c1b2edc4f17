"""Training rows as token ids and labels, kept flat: four bytes a token, in memory or mapped from a file."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

IGNORED = -100  # the label of a token that is not learned, as torch's cross-entropy has it
Span = tuple[int, int]  # of learned tokens: from the first to behind the last


@dataclass(frozen=True, slots=True)
class Example:
    """`input_ids` and `labels` of one row, of equal length; a label is the id at its own place, or -100."""

    input_ids: list[int]
    labels: list[int]

    def scored(self) -> int:
        """Return how many predictions this row is scored on: its labels, but for one on the very first token."""
        return sum(label != IGNORED for label in self.labels[1:])


class Examples(Sequence[Example]):
    """Many examples in four flat arrays. `examples[n]` makes an Example; nothing else holds the tokens twice.

    `ids` int32 [tokens] and `starts` int64 [rows + 1] are the rows; `spans` int32 [spans, 2] and `first_spans`
    int64 [rows + 1] are the stretches of each row that are learned, as places in the row.
    """

    ARRAYS = (("ids", np.int32), ("starts", np.int64), ("spans", np.int32), ("first_spans", np.int64))

    def __init__(self, ids: np.ndarray, starts: np.ndarray, spans: np.ndarray, first_spans: np.ndarray):
        self.ids, self.starts, self.spans, self.first_spans = ids, starts, spans.reshape(-1, 2), first_spans

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
        ids = self.ids[self.starts[row] : self.starts[row + 1]].tolist()
        labels = [IGNORED] * len(ids)
        for first, last in self.spans_of(row):
            labels[first:last] = ids[first:last]
        return Example(ids, labels)

    def __iter__(self) -> Iterator[Example]:
        return (self[row] for row in range(len(self)))

    def spans_of(self, row: int) -> list[Span]:
        """Return the learned stretches of a row."""
        return [(first, last) for first, last in self.spans[self.first_spans[row] : self.first_spans[row + 1]].tolist()]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the number of tokens of every row."""
        return tuple(np.diff(self.starts).tolist())

    def is_whole(self) -> bool:
        """Return whether the arrays fit together: False for files that were cut short."""
        rows = len(self.first_spans) == len(self.starts) > 0
        return rows and self.starts[-1] == len(self.ids) and self.first_spans[-1] == len(self.spans)

    def digest(self) -> str:
        """Return a sha256 of all tokens and of which are learned."""
        found = hashlib.sha256()
        for key, _ in self.ARRAYS:
            found.update(np.ascontiguousarray(getattr(self, key)).tobytes())
        return found.hexdigest()

    def save(self, folder: Path, name: str) -> None:
        """Write the arrays to `folder/name.ids`, `.starts`, `.spans` and `.first_spans`."""
        for key, _ in self.ARRAYS:
            getattr(self, key).tofile(folder / f"{name}.{key}")

    @classmethod
    def mapped(cls, folder: Path, name: str) -> "Examples":
        """Return what `save` wrote, mapped from the files: tokens are read when they are needed."""
        return cls(*(_map(folder / f"{name}.{key}", dtype) for key, dtype in cls.ARRAYS))


def _map(path: Path, dtype: Any) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


class Builder:
    """Takes rows one by one and gives an `Examples`. With `block` rows are put end to end and cut to blocks of that."""

    def __init__(self, block: int = 0):
        self._block = block
        self._ids, self._starts = array("i"), array("q", [0])
        self._spans, self._first_spans = array("i"), array("q", [0])

    def add(self, ids: Sequence[int], spans: Sequence[Span]) -> None:
        """Add a row with its learned stretches, or in blocks a document, all of which is learned."""
        self._ids.extend(ids)
        if self._block:
            while len(self._ids) - self._starts[-1] >= self._block:
                self._end(self._starts[-1] + self._block, [(0, self._block)])
        else:
            self._end(len(self._ids), spans)

    def _end(self, place: int, spans: Sequence[Span]) -> None:
        self._starts.append(place)
        for span in spans:
            self._spans.extend(span)
        self._first_spans.append(len(self._spans) // 2)

    def build(self) -> Examples:
        """Return the examples; what is left of the last block is one of its own."""
        left = len(self._ids) - self._starts[-1]
        if left:
            self._end(len(self._ids), [(0, left)])
        arrays = zip((self._ids, self._starts, self._spans, self._first_spans), Examples.ARRAYS, strict=True)
        return Examples(
            *(np.frombuffer(values, dtype) if values else np.empty(0, dtype) for values, (_, dtype) in arrays)
        )
