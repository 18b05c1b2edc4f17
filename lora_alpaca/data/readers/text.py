"""Text files, piece by piece: strict UTF-8, in lines or through a window, and the true position of every error."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from lora_alpaca.errors import DataError

CHUNK = 1 << 20  # bytes read at a time


def begin(file: BinaryIO, path: str) -> None:
    """Step over a byte-order mark; DataError if the first bytes are those of another encoding."""
    head: bytes = file.peek(4)[:4]  # type: ignore[attr-defined]  # shows without taking
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        raise DataError(f"{path}: looks like UTF-16 or UTF-32; convert it to UTF-8")
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))


def lines(file: BinaryIO, path: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, ends included. Only a newline ends one: U+2028 may stand inside a text."""
    done = file.tell()
    for number, line in enumerate(file, start=1):
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, number, done + error.start) from None
        done += len(line)


class Window:
    """The part of a text file that is in memory: `text`, whose first `offset` characters have been read."""

    def __init__(self, file: BinaryIO, path: str):
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.offset, self.ended = "", 0, False
        self._line, self._column, self._bytes = 1, 1, file.tell()  # where in the file the window begins, and ends

    def more(self) -> None:
        """Drop what is done with, and read as much again as is still there, at least a chunk."""
        self._line, self._column = self.position(self.offset)
        self.text, self.offset = self.text[self.offset :], 0
        data = self._file.read(max(CHUNK, len(self.text)))
        pending = len(self._decoder.getstate()[0])  # bytes of a character that the last chunk has cut
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line = self.position(len(self.text))[0] + data.count(b"\n", 0, max(0, error.start - pending))
            raise _not_utf8(self._path, line, self._bytes - pending + error.start) from None
        self._bytes += len(data)
        self.ended = not data

    def position(self, offset: int) -> tuple[int, int]:
        """Return line and column in the file, from 1, of an offset in the window."""
        before = self.text[:offset]
        lines = before.count("\n")
        return self._line + lines, len(before) - before.rfind("\n") if lines else self._column + len(before)


def _not_utf8(path: str, line: int, byte: int) -> DataError:
    return DataError(f"{path}: not UTF-8 at line {line}, byte {byte}; convert it to UTF-8")
