"""Rows to examples in one stream: read, encode, fit to the cutoff, count.

Only tokens are kept, so a million rows need little more memory than their ids.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lora_alpaca.data import Rows, gc_disabled
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Builder, Example, Examples
from lora_alpaca.data.statistics import Statistics
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation

CHUNK = 1000  # rows encoded together
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data."""

    train: Examples
    validation: Examples
    statistics: Statistics


def prepare(rows: Rows, encoder: Encoder, held_out: set[int], progress: Callable[[int], None]) -> Prepared:
    """Return the examples of all rows, those of the numbers in `held_out` for validation.

    `progress` is called with the number of rows that are done. Raises DataError where no row is left to learn from,
    or for the first row that is too long under `--overlong error`.
    """
    preparation = _Preparation(rows, encoder, held_out)
    first = 0
    with gc_disabled(), ThreadPoolExecutor(THREADS) as pool:
        for chunk, encoded in _encoded_ahead(pool, encoder, _chunks(rows)):
            preparation.take(first, chunk, encoded)
            first += len(chunk)
            progress(len(chunk))
    return preparation.done()


def _chunks(rows: Rows) -> Iterator[list[Conversation]]:
    stream = iter(rows)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk


def _encoded_ahead(
    pool: ThreadPoolExecutor, encoder: Encoder, chunks: Iterable[list[Conversation]]
) -> Iterator[tuple[list[Conversation], list[Example]]]:
    """Yield chunks with their encoded rows, in order, while the next ones are being encoded.

    The tokenizer works outside of Python, so chunks are encoded at the same time, and while Python counts.
    """
    pending: deque[tuple[list[Conversation], Future[list[Example]]]] = deque()
    for chunk in chunks:
        pending.append((chunk, pool.submit(encoder.encode, chunk)))
        if len(pending) > THREADS:
            done, encoded = pending.popleft()
            yield done, encoded.result()
    for done, encoded in pending:
        yield done, encoded.result()


class _Preparation:
    """Two builders, and the statistics, that the encoded rows are added to."""

    def __init__(self, rows: Rows, encoder: Encoder, held_out: set[int]):
        self._encoder, self._choices, self._held_out = encoder, encoder.choices, held_out
        self._documents = set(rows.formats) == {"text"}
        block = self._choices.cutoff_len if self._documents else 0
        self._parts = {"train": Builder(block), "validation": Builder(block)}
        self._double, self._shared = _doubles(rows, held_out)
        self._lengths = np.zeros(len(rows), np.int32)
        self.statistics = Statistics(
            self._choices.cutoff_len, read=len(rows) + len(rows.dropped), formats=dict(rows.formats)
        )
        for where, reason in rows.dropped:
            self.statistics.bad.add(where, reason)
        for where in rows.empty_answers:
            self.statistics.empty_answers.add(where)
        for where in rows.blank_instructions:
            self.statistics.blank_instructions.add(where)

    def take(self, first: int, conversations: list[Conversation], encoded: list[Example]) -> None:
        """Count encoded rows, whose numbers begin at `first`, and add them to the training or the validation part."""
        for number, (conversation, row) in enumerate(zip(conversations, encoded, strict=True), start=first):
            self._note(number, conversation, row)
            kept = row if self._documents else self._fitted(row, conversation.where)
            if kept is not None:
                self._parts["validation" if number in self._held_out else "train"].add(kept)

    def _note(self, number: int, conversation: Conversation, row: Example) -> None:
        statistics, where = self.statistics, conversation.where
        self._lengths[number] = len(row.ids)
        if self._double[number]:
            statistics.duplicates.add(where)
        if self._shared[number]:
            statistics.shared.add(where)
        learns_all = self._choices.add_eos_token and self._choices.train_on == "all"
        if learns_all and len(row.ends) < len(conversation.answers):
            statistics.last_turn_only.add(where)
        typed = next(filter(None, map(self._encoder.text.control_pattern.search, conversation.texts())), None)
        if typed:
            statistics.control_text.add(where, typed[0])

    def _fitted(self, row: Example, where: str) -> Example | None:
        """Return a row at most as long as the cutoff, or None for one that is dropped."""
        statistics, cutoff, overlong = self.statistics, self._choices.cutoff_len, self._choices.overlong
        long = len(row.ids) > cutoff
        if long and overlong == "error":
            raise DataError(f"{where}: {len(row.ids)} tokens, more than --cutoff_len {cutoff} (--overlong error)")
        if long and overlong == "drop":
            statistics.overlong.add(where)
            return None
        kept = row.cut(cutoff) if long else row
        if not kept.num_labels():
            statistics.without_label.add(where)
            return None
        if long:
            statistics.truncated.add(where)
            if len(kept.ends) < len(row.ends):
                statistics.ends_lost.add(where)
        return kept

    def done(self) -> Prepared:
        """Return the examples, with the statistics summed up."""
        train, validation, statistics = self._parts["train"].build(), self._parts["validation"].build(), self.statistics
        if not len(train):
            raise DataError(
                f"no row has anything to learn at --cutoff_len {self._choices.cutoff_len}: "
                f"{statistics.dropped()} of {statistics.read} rows are dropped "
                f"(first: {(statistics.without_label.first + statistics.overlong.first + statistics.bad.first)[0]})"
            )
        statistics.train, statistics.validation = len(train), len(validation)
        statistics.tokens, statistics.learned = len(train.ids), int((train.spans[:, 1] - train.spans[:, 0]).sum())
        shares = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
        lengths = np.sort(self._lengths)
        statistics.percentiles = {
            name: int(lengths[min(len(lengths) - 1, int(share * len(lengths)))]) for name, share in shares.items()
        }
        return Prepared(train, validation, statistics)


def _doubles(rows: Rows, held_out: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return for every row whether an earlier one says the same, and whether it is held out and trained on too."""
    keys = np.frombuffer(rows.keys, np.uint64)
    double, held = np.ones(len(keys), bool), np.zeros(len(keys), bool)
    double[np.unique(keys, return_index=True)[1]] = False
    held[list(held_out)] = True
    return double, held & np.isin(keys, keys[~held])
