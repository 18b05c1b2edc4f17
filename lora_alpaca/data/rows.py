"""All rows of a run: checked, counted and hashed once, then read again whenever they are needed, never held.

The first reading finds every mistake and every double before a tokenizer is loaded. The second, for encoding, must
find the same rows: a file that changes in between is an error.
"""

import hashlib
import json
import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_alpaca.common_options import DEMO
from lora_alpaca.data import files, formats
from lora_alpaca.data.files import Bad
from lora_alpaca.data.formats import Format, RowError
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation

MAX_VALIDATION_ROWS = 2000


def demo_file(name: str) -> Path:
    """Return the path of a part of the demo data: train, development, final or spare."""
    return Path(__file__).parent.parent / "demo" / "instructions" / f"{name}.json"


class Rows(Iterable[Conversation]):
    """The good rows behind `--data_path`, in their order; every iteration reads them anew.

    `data_path` is a file, a hub id with optional config, split and revision, `demo`, or several with commas between.
    `columns` are FIELD=COLUMN pairs; `skip_bad_rows` leaves out what would be an error. Raises DataError naming file
    and row.

    `dropped` are (where, reason) of bad rows; `formats` counts rows by format; `keys` has a 64-bit hash of every row;
    `empty_answers` and `blank_instructions` say where such rows stand; `digest` is a sha256 of all texts.
    """

    def __init__(self, data_path: str, columns: list[str] | None = None, skip_bad_rows: bool = False):
        self.data_path = data_path
        self._columns = formats.parse_columns(columns or [])
        self._skip = skip_bad_rows
        self._sources = [_Source(part) for part in _parts(data_path)]
        self.formats: Counter[str] = Counter()
        self.dropped: list[tuple[str, str]] = []
        self.ignored: set[str] = set()
        self.empty_answers: list[str] = []
        self.blank_instructions: list[str] = []
        self.keys = array("Q")
        self._first_reading()

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Conversation]:
        """Yield the conversations; DataError at the end if they are not those of the first reading."""
        sha, count = hashlib.sha256(), 0
        for conversation, _ in self._read():
            sha.update(_key(conversation))
            count += 1
            yield conversation
        if sha.hexdigest() != self.digest:
            raise DataError(
                f"{self.data_path}: the rows changed while they were read ({len(self)} before, {count} now)"
            )

    def _first_reading(self) -> None:
        sha = hashlib.sha256()
        answered = 0
        for conversation, kind in self._read(self._drop):
            key = _key(conversation)
            sha.update(key)
            self.keys.append(int.from_bytes(key[:8], "little"))
            self.formats[kind.name] += 1
            filled = any(answer.strip() for answer in conversation.answers)
            answered += filled
            if not all(answer.strip() for answer in conversation.answers):
                self.empty_answers.append(conversation.where)
            if not all(message.text.strip() for message in conversation.users):
                self.blank_instructions.append(conversation.where)
        self.digest = sha.hexdigest()
        if not self.keys:
            dropped = f", and {len(self.dropped)} bad ones ({self._reason()})" if self.dropped else ""
            raise DataError(f"{self.data_path}: contains 0 rows{dropped}")
        if self.dropped and not self._skip:
            raise DataError(self._reason())
        if not answered:
            raise DataError(f"{self.data_path}: the output of every row is empty; there is nothing to learn")

    def _reason(self) -> str:
        return ": ".join(self.dropped[0])

    def _drop(self, where: str, reason: str) -> None:
        self.dropped.append((where, reason))

    def _read(
        self, drop: Callable[[str, str], None] = lambda where, reason: None
    ) -> Iterator[tuple[Conversation, Format]]:
        """Yield the good rows of all sources with their formats; bad ones go to `drop`, or are errors."""
        for source in self._sources:
            kind: Format | None = None
            for number, row in source.read():
                where = f"{source.name}:{number}"
                try:
                    if isinstance(row, Bad):
                        raise RowError(row.reason)
                    named = formats.renamed(row, self._columns)
                    kind = kind or formats.recognise(named)
                    conversation = formats.conversation(named, kind, where)
                except RowError as error:
                    if not self._skip and row != {}:  # where all rows are {}, that is what to say
                        raise DataError(f"{where}: {error}") from None
                    drop(where, str(error))
                    continue
                self.ignored |= named.keys() - set(kind.fields + kind.optional)
                yield conversation, kind


class _Source:
    """One file or hub dataset of `--data_path`; what it is, is clear before anything is read."""

    def __init__(self, name: str):
        path = demo_file("train") if name == DEMO else Path(name).expanduser()
        self._path: Path | None = path
        self.name = path.name
        if files.suffix(path):
            return
        try:
            exists = path.exists()
        except OSError as error:  # a name that is too long
            raise DataError(f"--data_path {name[:60]}: {error.strerror}") from None
        hub = files.hub_id(name)
        local = exists or path.is_absolute() or name.startswith((".", "~")) or (path.suffix and "/" not in name)
        if local or not hub:
            kinds = ", ".join(files.SUFFIXES)
            missing = "" if exists else "no such file; "
            raise DataError(f"{name}: {missing}data is read from {kinds}, each also .gz, or from a hub id")
        self._path, self.name = None, name

    def read(self) -> files.NumberedRows:
        return files.read_hub(self.name) if self._path is None else files.read_file(self._path)


def _parts(data_path: str) -> list[str]:
    """Return the sources of a --data_path, which is a list with commas unless it names a file."""
    if files.suffix(Path(data_path)) and Path(data_path).expanduser().exists():
        return [data_path]
    return [part for part in data_path.split(",") if part]


def _key(conversation: Conversation) -> bytes:
    """Return a hash of what a row says, of 16 bytes."""
    said: Any = [(message.role, message.text, message.input) for message in conversation.messages]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).digest()


def held_out(rows: int, val_set_size: float | None, seed: int) -> set[int]:
    """Return the row numbers for validation: the same for the same seed, on every rank and every machine.

    `val_set_size` is a number of rows, a share below 1, or None for 2000 but at most a tenth of the rows.
    """
    if val_set_size is None:
        size = min(MAX_VALIDATION_ROWS, rows // 10)
    elif val_set_size < 1:
        size = math.ceil(val_set_size * rows)
    else:
        size = int(val_set_size)
    if size >= rows:
        raise DataError(f"--val_set_size {size}: there are only {rows} rows, and none would be left to train on")
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return set(order[:size])
