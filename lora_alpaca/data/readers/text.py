"""Text files, piece by piece: strict UTF-8, in lines or through a window, and the true position of every error."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from lora_alpaca.errors import DataError

CHUNK = 1 << 20  # bytes read at a time
MAX_ROW = 128 << 20  # bytes of one row: memory stays a few times that, whatever an archive grows to
TOO_LONG = f"this row is longer than {MAX_ROW >> 20} MB; divide it, or leave it out"
_FOREIGN = {  # first bytes of what is not text, whatever its name says
    b"PK\x03\x04": "a zip archive or a workbook of a spreadsheet; unpack it, or save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an old workbook or document of an office program; save it as CSV UTF-8, or as plain text",
    b"\x1f\x8b": "compressed with gzip; its name must end in .gz",
    b"PAR1": "a Parquet file; its name must end in .parquet",
    b"ARROW1": "an Arrow file; its name must end in .arrow",
    b"%PDF-": "a PDF document; save its text as .txt",
    b"SQLite format 3\0": "a database; write its rows as .csv or .jsonl",
    b"version https://git-lfs": "a pointer of Git LFS, not the data; git lfs pull fetches it",
}


def too_long(path: str, row: int) -> DataError:
    """Return the error about a row that is longer than any may be."""
    return DataError(f"{path}:{row}: {TOO_LONG}")


def refuse_foreign(file: BinaryIO, path: str, own: bytes = b"-") -> bytes:
    """Return the first four bytes without taking them; DataError if they tell of a kind other than the `own` one."""
    head: bytes = file.peek(32)  # type: ignore[attr-defined]  # shows what is buffered
    for mark, what in _FOREIGN.items():
        if head.startswith(mark) and mark != own:
            raise DataError(f"{path}: {what}")
    return head[:4]


def begin(file: BinaryIO, path: str) -> None:
    """Step over a byte-order mark; DataError if the first bytes are those of another encoding or kind of file."""
    head = refuse_foreign(file, path)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        raise DataError(f"{path}: looks like UTF-16 or UTF-32; convert it to UTF-8")
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))


def lines(file: BinaryIO, path: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, ends included. Only a newline ends one: U+2028 may stand inside a text."""
    done = file.tell()
    for number, line in enumerate(iter(lambda: file.readline(MAX_ROW + 1), b""), start=1):
        if len(line) > MAX_ROW:
            raise too_long(path, number)
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, done + error.start) from None
        done += len(line)


def whole(file: BinaryIO, path: str) -> str:
    """Return all of a file as one text."""
    begin(file, path)
    start = file.tell()
    data = file.read(MAX_ROW + 1)
    if len(data) > MAX_ROW:
        raise too_long(path, 1)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, 1 + data.count(b"\n", 0, error.start), start + error.start) from None


class Window:
    """The part of a text file that is in memory: `text`, whose first `offset` characters have been read."""

    def __init__(self, file: BinaryIO, path: str):
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.offset, self.ended = "", 0, False
        self._line, self._column, self._bytes = 1, 1, file.tell()  # where in the file the window begins, and ends

    def more(self, row: int) -> None:
        """Drop what is done with, and read as much again as is still there; DataError if row `row` is too long."""
        self._line, self._column = self.position(self.offset)
        self.text, self.offset = self.text[self.offset :], 0
        self.check(self.text, row)
        data = self._file.read(max(CHUNK, min(len(self.text), MAX_ROW - len(self.text))))
        pending = len(self._decoder.getstate()[0])  # bytes of a character that the last chunk has cut
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.position(len(self.text))[0] + data.count(b"\n", 0, max(0, error.start - pending))
            raise _not_utf8(self._path, line, self._bytes - pending + error.start) from None
        self._bytes += len(data)
        self.ended = not data

    def check(self, value: str, row: int) -> None:
        """Raise DataError if a value, or what has been read of it, is longer than a row may be."""
        if len(value) > MAX_ROW // 4 and len(value.encode()) > MAX_ROW:  # a character has four bytes at most
            raise too_long(self._path, row)

    def position(self, offset: int) -> tuple[int, int]:
        """Return line and column in the file, from 1, of an offset in the window."""
        before = self.text[:offset]
        lines = before.count("\n")
        return self._line + lines, len(before) - before.rfind("\n") if lines else self._column + len(before)


def _not_utf8(path: str, line: int, byte: int) -> DataError:
    return DataError(f"{path}: not UTF-8 at line {line}, byte {byte}; convert it to UTF-8")
