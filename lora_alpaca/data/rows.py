"""All rows of a run: checked, counted and hashed once, then read again when they are needed, never kept in memory.

The first reading finds every mistake and every double before a tokenizer is loaded. The second, for encoding, must
find the same rows: a file that changes in between is an error.
"""

import hashlib
import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from lora_alpaca.config.importing import gc_disabled
from lora_alpaca.data import formats
from lora_alpaca.data.formats import Fields, Format, Rejected, RowError
from lora_alpaca.data.readers.json_rows import Bad
from lora_alpaca.data.readers.sources import open_sources
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation

MAX_VALIDATION_ROWS = 2000


class Rows(Iterable[Conversation]):
    """The good rows behind `--data_path`, in their order; every iteration reads them anew.

    `data_path` is a file, a folder or pattern of files, a hub id with optional config, split and revision, `demo`, or
    several with commas between. `columns` are FIELD=COLUMN pairs; `skip_bad_rows` leaves out what would be an error;
    `ignore_fields` are fields of rows and turns that may go unused though they carry meaning. Raises DataError naming
    file and row.

    `fields` tells which fields went unused; `dropped` are (where, reason) of bad rows; `formats` counts rows by
    format; `keys` has a 64-bit hash of every row; `empty_answers` and `blank_instructions` name such rows;
    `digest` is a sha256 of all that they say.
    """

    def __init__(
        self,
        data_path: str,
        columns: list[str] | None = None,
        skip_bad_rows: bool = False,
        ignore_fields: list[str] | None = None,
    ):
        self.data_path = data_path
        self._columns = formats.parse_columns(columns or [])
        self._skip = skip_bad_rows
        self._sources, self._found = open_sources(data_path)
        self.formats: Counter[str] = Counter()
        self.dropped: list[tuple[str, str]] = []
        self.fields = Fields(ignore_fields or ())
        self._rejected: list[tuple[str, str]] = []
        self.empty_answers: list[str] = []
        self.blank_instructions: list[str] = []
        self.keys = array("Q")
        with gc_disabled():  # rows make no cycles, and the searches take a third of the time
            self._first_reading()

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Conversation]:
        """Yield the conversations; DataError at the first that is not the one of the first reading."""
        count = 0
        for conversation, _ in self._read():
            if count == len(self) or _number(_key(conversation)) != self.keys[count]:
                raise DataError(f"{conversation.where}: this row changed while the data was read; start again")
            count += 1
            yield conversation
        if count < len(self):
            raise DataError(f"{self.data_path}: {len(self)} rows, and now {count}: the data changed; start again")

    @property
    def notes(self) -> list[str]:
        """Return lines on what the rows were read from, and what was left out there."""
        return [*self._found, *(note for source in self._sources for note in source.notes)]

    @property
    def revisions(self) -> dict[str, str]:
        """Return name -> commit of every dataset of the hub that was read, where its library knows it."""
        return {source.name: source.revision for source in self._sources if source.revision}

    def _first_reading(self) -> None:
        sha = hashlib.sha256()
        answered = 0
        for conversation, kind in self._read(self._drop):
            key = _key(conversation)
            sha.update(key)
            self.keys.append(_number(key))
            self.formats[kind.name] += 1
            blank = [message.is_blank for message in conversation.messages if message.role == "assistant"]
            answered += not all(blank)
            if any(blank):
                self.empty_answers.append(conversation.where)
            if not all(message.text.strip() for message in conversation.users):
                self.blank_instructions.append(conversation.where)
        self.digest = sha.hexdigest()
        if self._rejected and not self._skip:
            number, (where, reason) = len(self._rejected), self._rejected[0]
            raise DataError(
                f"{where}: {reason}; {number:,} of {len(self) + number:,} rows are so, and bad answers are never "
                "learned: --skip_bad_rows leaves them out"
            )
        if not self.keys:
            dropped = (
                f" that can be used, and {len(self.dropped)} that cannot; {self._reason()}" if self.dropped else ""
            )
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
                    conversation = formats.conversation(named, kind, where, self.fields)
                except RowError as error:
                    if isinstance(error, Rejected) and not self._skip:  # an error too, once they are counted
                        self._rejected.append((where, str(error)))
                        continue
                    if not self._skip and row != {}:  # where all rows are {}, the error is that there are none
                        raise DataError(f"{where}: {error}") from None
                    drop(where, str(error))
                    continue
                yield conversation, kind


def _key(conversation: Conversation) -> bytes:
    """Return a hash of everything that a row says, of 16 bytes."""
    texts = [
        part
        for message in conversation.messages  # lengths keep "a", "bc" and "ab", "c" apart
        for part in (message.role, str(len(message.text)), message.text, str(len(message.input)), message.input)
    ]
    if not conversation.is_plain or not all(message.learned for message in conversation.messages):
        texts.append(repr((conversation.messages, conversation.tools)))
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=16).digest()


def _number(key: bytes) -> int:
    return int.from_bytes(key[:8], "little")


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
        share = f" of the rows, which is {size}" if val_set_size and val_set_size < 1 else ""
        raise DataError(
            f"--val_set_size {val_set_size:g}{share}: there are only {rows} rows, and none would be left to train on"
        )
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return set(order[:size])
