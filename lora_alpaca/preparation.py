"""Rows to examples in one stream: read, encode, fit to the cutoff, count; and the same from a cache if nothing changed.

Only tokens are kept, so a million rows need little more memory than their ids.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lora_alpaca import __version__
from lora_alpaca.config.shared import DataOptions
from lora_alpaca.data import Rows, uncollected
from lora_alpaca.encoding import Encoded, Encoder
from lora_alpaca.errors import DataError
from lora_alpaca.examples import Builder, Examples
from lora_alpaca.ledger import Ledger
from lora_alpaca.prompts import Conversation
from lora_alpaca.storage import atomic
from lora_alpaca.storage.paths import user_cache, user_path

CHUNK = 1000  # rows encoded together
THREADS = min(8, os.cpu_count() or 1)
CACHED_FROM = 5000  # rows; fewer are encoded in no time
KEPT = 10  # prepared data sets in the cache; the one that was not used for longest goes first
LEDGER = "ledger.json"


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data."""

    train: Examples
    validation: Examples
    ledger: Ledger


def prepare(
    rows: Rows, encoder: Encoder, options: DataOptions, held_out: set[int], progress: Callable[[int], None]
) -> Prepared:
    """Return the examples of all rows, those of the numbers in `held_out` for validation.

    `progress` is called with the number of rows that are done. Raises DataError where no row is left to learn from,
    or for the first row that is too long under `--overlong error`.
    """
    documents = set(rows.formats) == {"text"}
    work = _Work(rows, encoder, options, held_out, blocks=encoder.cutoff_len if documents else 0)
    first = 0
    with uncollected(), ThreadPoolExecutor(THREADS) as pool:
        for chunk, encoded in _ahead(pool, encoder, _chunks(rows)):
            work.take(first, chunk, encoded)
            first += len(chunk)
            progress(len(chunk))
    return work.done()


def _chunks(rows: Rows) -> Iterator[list[Conversation]]:
    stream = iter(rows)
    while chunk := list(islice(stream, CHUNK)):
        yield chunk


def _ahead(
    pool: ThreadPoolExecutor, encoder: Encoder, chunks: Iterable[list[Conversation]]
) -> Iterator[tuple[list[Conversation], list[Encoded]]]:
    """Yield chunks with their encoded rows, in order, while the next ones are under way.

    The tokenizer's work, outside of Python, goes on beside Python's own and that of other chunks.
    """
    under_way: deque[tuple[list[Conversation], Future[list[Encoded]]]] = deque()
    for chunk in chunks:
        for conversation in chunk:
            encoder.template.check(conversation)
        under_way.append((chunk, pool.submit(encoder.encode, chunk)))
        if len(under_way) > THREADS:
            done, encoded = under_way.popleft()
            yield done, encoded.result()
    for done, encoded in under_way:
        yield done, encoded.result()


class _Work:
    """The preparation under way: two builders, and the ledger that every row goes through."""

    def __init__(self, rows: Rows, encoder: Encoder, options: DataOptions, held_out: set[int], blocks: int):
        self._rows, self._encoder, self._overlong, self._blocks = rows, encoder, options.overlong, blocks
        self._held_out = held_out
        self._parts = {"train": Builder(blocks), "validation": Builder(blocks)}
        self._double, self._shared = _doubles(rows, held_out)
        self._lengths = np.zeros(len(rows), np.int32)
        self.ledger = Ledger(encoder.cutoff_len, read=len(rows) + len(rows.dropped), formats=dict(rows.formats))
        for where, reason in rows.dropped:
            self.ledger.bad.add(where, reason)
        for where in rows.empty_answers:
            self.ledger.empty_answers.add(where)
        for where in rows.blank_instructions:
            self.ledger.blank_instructions.add(where)

    def take(self, first: int, conversations: list[Conversation], encoded: list[Encoded]) -> None:
        """Put encoded rows, whose numbers count up from `first`, where they belong."""
        for number, (conversation, row) in enumerate(zip(conversations, encoded, strict=True), start=first):
            self._note(number, conversation, row)
            kept = row if self._blocks else self._fitted(row, conversation.where)
            if kept is not None:
                self._parts["validation" if number in self._held_out else "train"].add(kept.ids, kept.spans)
        for conversation, other in zip(conversations, self._encoder.other_ids(conversations), strict=True):
            if other:
                self.ledger.other_ids.add(conversation.where, _seam(conversation, self._encoder))

    def _note(self, number: int, conversation: Conversation, row: Encoded) -> None:
        ledger, where = self.ledger, conversation.where
        self._lengths[number] = len(row.ids)
        if self._double[number]:
            ledger.duplicates.add(where)
        if self._shared[number]:
            ledger.shared.add(where)
        learns_all = self._encoder.add_eos_token and not self._encoder.last_only
        if learns_all and len(row.ends) < len(conversation.answers):
            ledger.last_turn_only.add(where)
        typed = next(filter(None, map(self._encoder.text.control_pattern.search, conversation.texts())), None)
        if typed:
            ledger.control_text.add(where, typed[0])

    def _fitted(self, row: Encoded, where: str) -> Encoded | None:
        """Return a row at most as long as the cutoff, or None for one that is dropped."""
        ledger, cutoff = self.ledger, self._encoder.cutoff_len
        long = len(row.ids) > cutoff
        if long and self._overlong == "error":
            raise DataError(f"{where}: {len(row.ids)} tokens, more than --cutoff_len {cutoff} (--overlong error)")
        if long and self._overlong == "drop":
            ledger.overlong.add(where)
            return None
        kept = row.cut(cutoff) if long else row
        if kept.scored() <= 0:
            ledger.without_label.add(where)
            return None
        if long:
            ledger.truncated.add(where)
            if len(kept.ends) < len(row.ends):
                ledger.ends_lost.add(where)
        return kept

    def done(self) -> Prepared:
        """Return the examples, with the ledger summed up."""
        train, validation, ledger = self._parts["train"].build(), self._parts["validation"].build(), self.ledger
        if not len(train):
            raise DataError(
                f"no row has anything to learn at --cutoff_len {self._encoder.cutoff_len}: "
                f"{ledger.dropped()} of {ledger.read} rows are dropped "
                f"(first: {(ledger.without_label.first + ledger.overlong.first + ledger.bad.first)[0]})"
            )
        ledger.train, ledger.validation = len(train), len(validation)
        ledger.tokens, ledger.learned = len(train.ids), int((train.spans[:, 1] - train.spans[:, 0]).sum())
        shares = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
        lengths = np.sort(self._lengths)
        ledger.percentiles = {
            name: int(lengths[min(len(lengths) - 1, int(share * len(lengths)))]) for name, share in shares.items()
        }
        return Prepared(train, validation, ledger)


def _doubles(rows: Rows, held_out: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return for every row whether an earlier one says the same, and whether it is held out and trained on too."""
    keys = np.frombuffer(rows.keys, np.uint64)
    double, held = np.ones(len(keys), bool), np.zeros(len(keys), bool)
    double[np.unique(keys, return_index=True)[1]] = False
    held[list(held_out)] = True
    return double, held & np.isin(keys, keys[~held])


def _seam(conversation: Conversation, encoder: Encoder) -> str:
    before = encoder.template.prompt(conversation)[-1].text
    return repr(f"{before[-12:]}|{conversation.answers[0][:12]}")


# ------------------------------------------------------------------------------------------------------------ cache


def cache_folder(cache_dir: str) -> Path | None:
    """Return where prepared rows are kept, as `--cache_dir` says; None for nowhere."""
    if cache_dir == "none":
        return None
    if cache_dir:
        return user_path(cache_dir)
    return user_cache()


def cache_key(rows: Rows, encoder: Encoder, options: DataOptions, held_out: set[int], tokenizer_sha256: str) -> str:
    """Return a sha256 of everything that prepared rows depend on."""
    facts: dict[str, Any] = {
        "version": __version__,
        "data": [rows.data_path, rows.digest, rows.dropped],
        "held_out": sorted(held_out),
        "tokenizer": tokenizer_sha256,
        "template": [encoder.template.name, encoder.template.digest()],
        "choices": [encoder.cutoff_len, encoder.train_on_inputs, encoder.add_eos_token, encoder.last_only],
        "overlong": options.overlong,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def cached(folder: Path | None, key: str) -> Prepared | None:
    """Return what an earlier run prepared, mapped from its files; None if there is nothing, or nothing whole."""
    if folder is None or not (folder / key / LEDGER).is_file():
        return None
    try:
        ledger = Ledger.from_json(json.loads((folder / key / LEDGER).read_text(encoding="utf-8")))
        train, validation = (Examples.mapped(folder / key, name) for name in ("train", "validation"))
        sizes = (len(train), len(validation)) == (ledger.train, ledger.validation)
        whole = sizes and train.is_whole() and validation.is_whole()
        os.utime(folder / key)
    except (OSError, ValueError, TypeError):
        return None
    return Prepared(train, validation, ledger) if whole else None


def keep(folder: Path | None, key: str, prepared: Prepared) -> Prepared:
    """Write prepared rows to the cache, appearing there whole or not at all, and return them mapped from it.

    A cache that cannot be written to is none: the rows are returned as they are.
    """
    if folder is None:
        return prepared
    stage = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        prepared.train.save(stage, "train")
        prepared.validation.save(stage, "validation")
        (stage / LEDGER).write_text(json.dumps(prepared.ledger.to_json()), encoding="utf-8")
        if (folder / key).exists():  # of another process, or damaged
            shutil.rmtree(folder / key)
        atomic.fsync_tree(stage)
        atomic.rename(stage, folder / key)
        _forget_oldest(folder)
    except OSError:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        return prepared
    return cached(folder, key) or prepared


def _forget_oldest(folder: Path) -> None:
    """Remove prepared data sets, which are named by their hash and hold a ledger, beyond the newest."""
    ours = [path for path in folder.iterdir() if len(path.name) == 64 and (path / LEDGER).is_file()]
    for path in sorted(ours, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)
