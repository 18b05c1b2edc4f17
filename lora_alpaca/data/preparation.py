"""Rows to examples in one stream: read, encode, fit to the cutoff, count.

Only tokens are kept, so a million rows need little more memory than their ids.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from lora_alpaca.config.importing import gc_disabled
from lora_alpaca.data import Rows
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


def prepare(
    rows: Rows,
    encoder: Encoder,
    held_out: set[int],
    progress: Callable[[int], None],
    validation: Rows | None = None,
) -> Prepared:
    """Return the examples of all rows; those of the numbers in `held_out`, and of `validation`, are for validation.

    `progress` is called with the number of rows that are done. Raises DataError where no row is left to learn from, or
    none of `validation` to validate on, or for the first row that is too long under `--overlong error`.
    """
    parts = [rows] if validation is None else [rows, validation]
    preparation = _Preparation(parts, encoder, held_out)
    first = 0
    with gc_disabled(), ThreadPoolExecutor(THREADS) as pool:
        for chunk, encoded in _encoded_ahead(pool, encoder, chain.from_iterable(map(_chunks, parts))):
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
) -> Iterator[tuple[list[Conversation], list[list[Example]]]]:
    """Yield chunks with their encoded rows, in order, while the next ones are being encoded.

    The tokenizer works outside of Python, so chunks are encoded at the same time, and while Python counts.
    """
    pending: deque[tuple[list[Conversation], Future[list[list[Example]]]]] = deque()
    for chunk in chunks:
        pending.append((chunk, pool.submit(encoder.encode_rows, chunk)))
        if len(pending) > THREADS:
            done, encoded = pending.popleft()
            yield done, encoded.result()
    for done, encoded in pending:
        yield done, encoded.result()


class _Preparation:
    """Two builders, and the statistics, that the encoded rows are added to.

    `files` are the rows to train on and, where they are rows of their own, those to validate on; numbered through.
    """

    def __init__(self, files: Sequence[Rows], encoder: Encoder, held_out: set[int]):
        self._encoder, self._choices, self._files = encoder, encoder.choices, files
        number = sum(map(len, files))
        self._held_out = held_out | set(range(len(files[0]), number))
        self._documents = {"train": are_documents(files[0]), "validation": are_documents(files[-1])}
        self._parts = {name: Builder(self._choices.cutoff_len * joined) for name, joined in self._documents.items()}
        self._double, self._shared = _doubles(files, self._held_out)
        self._lengths = np.zeros(number, np.int32)
        self.statistics = Statistics(
            self._choices.cutoff_len,
            read=number + sum(len(rows.dropped) for rows in files),
            formats=dict(sum((rows.formats for rows in files), Counter())),
        )
        for rows in files:
            for where, reason in rows.dropped:
                self.statistics.bad.add(where, reason)
            for where in rows.empty_answers:
                self.statistics.empty_answers.add(where)
            for where in rows.blank_instructions:
                self.statistics.blank_instructions.add(where)

    def take(self, first: int, conversations: list[Conversation], encoded: list[list[Example]]) -> None:
        """Count encoded rows, whose numbers begin at `first`, and add them to the training or the validation part."""
        for number, (conversation, examples) in enumerate(zip(conversations, encoded, strict=True), start=first):
            self._note(number, conversation, examples)
            part = "validation" if number in self._held_out else "train"
            for kept in examples if self._documents[part] else self._fitted(examples, conversation.where):
                self._parts[part].add(kept, number)

    def _note(self, number: int, conversation: Conversation, examples: list[Example]) -> None:
        statistics, where = self.statistics, conversation.where
        self._lengths[number] = max((len(example.ids) for example in examples), default=0)
        if self._double[number]:
            statistics.duplicates.add(where)
        if self._shared[number]:
            statistics.shared.add(where)
        if not conversation.learned:
            statistics.unlearned.add(where)
        elif not all(message.learned for message in conversation.messages):
            statistics.only_seen.add(where)
        if len(examples) > 1:
            statistics.turn_by_turn.add(where)
        typed = next(filter(None, map(self._encoder.text.control_pattern.search, conversation.texts())), None)
        if typed:
            statistics.control_text.add(where, typed[0])

    def _fitted(self, examples: list[Example], where: str) -> list[Example]:
        """Return the examples of a row at most as long as the cutoff, without those that are dropped."""
        statistics, cutoff, overlong = self.statistics, self._choices.cutoff_len, self._choices.overlong
        longest = max((len(example.ids) for example in examples), default=0)
        if longest > cutoff and overlong == "error":
            raise DataError(f"{where}: {longest} tokens, more than --cutoff_len {cutoff} (--overlong error)")
        fitting = [example for example in examples if len(example.ids) <= cutoff or overlong != "drop"]
        kept = [example.cut(cutoff) if len(example.ids) > cutoff else example for example in fitting]
        cut = [(example, rest) for example, rest in zip(fitting, kept, strict=True) if rest is not example]
        kept = [example for example in kept if example.num_labels()]
        if len(fitting) < len(examples):
            statistics.overlong.add(where)
        elif len(kept) < len(fitting):
            statistics.without_label.add(where)
        if cut := [(example, rest) for example, rest in cut if rest.num_labels()]:
            statistics.truncated.add(where)
            if any(len(rest.ends) < len(example.ends) for example, rest in cut):
                statistics.ends_lost.add(where)
        return kept

    def done(self) -> Prepared:
        """Return the examples, with the statistics summed up."""
        train, validation, statistics = self._parts["train"].build(), self._parts["validation"].build(), self.statistics
        if not len(train):
            raise DataError(
                f"no row has anything to learn at --cutoff_len {self._choices.cutoff_len}: "
                f"{statistics.dropped()} of {statistics.read} rows are dropped "
                f"(first: {statistics.first_dropped()})"
            )
        if len(self._files) > 1 and not len(validation):
            raise DataError(
                f"--val_data_path {self._files[1].data_path}: at --cutoff_len {self._choices.cutoff_len} no row of it "
                "has an answer to validate on"
            )
        statistics.train, statistics.validation = len(train), len(validation)
        statistics.tokens, statistics.learned = len(train.ids), int((train.spans[:, 1] - train.spans[:, 0]).sum())
        shares = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
        lengths = np.sort(self._lengths)
        statistics.percentiles = {
            name: int(lengths[min(len(lengths) - 1, int(share * len(lengths)))]) for name, share in shares.items()
        }
        return Prepared(train, validation, statistics)


def are_documents(rows: Rows) -> bool:
    """Return whether rows are documents, which are put end to end and cut to blocks of --cutoff_len."""
    return set(rows.formats) == {"text"}


def _doubles(files: Sequence[Rows], held_out: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return for every row whether an earlier one says the same, and whether it is held out and trained on too."""
    keys = np.concatenate([np.frombuffer(rows.keys, np.uint64) for rows in files])
    double, held = np.ones(len(keys), bool), np.zeros(len(keys), bool)
    double[np.unique(keys, return_index=True)[1]] = False
    held[list(held_out)] = True
    return double, held & np.isin(keys, keys[~held])
