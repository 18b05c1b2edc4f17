"""JSON to raw rows, strictly: an array or one value a line, in chunks, with the true position of every error.

What spoils the whole file is a DataError; what spoils one row is a `Bad` instead of it.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from lora_alpaca.data.readers import text
from lora_alpaca.data.readers.text import Window
from lora_alpaca.errors import DataError

NumberedRows = Iterator[tuple[int, Any]]

_BLANK = " \t\r\n"  # what JSON takes for white space
_GAP = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")
_LONGEST_WORD = 16  # characters in which a number, an escape or a word that the window cuts may look like another one
_LARGE = 8 << 20  # characters of a row whose values are counted before it is read
_MOST_VALUES = 4_000_000  # of a row; each takes up to 70 bytes in memory, and an empty list two in a file
_TEXT = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_OBJECT = 1 << 26  # bytes; an object over several lines is recognised up to this size


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used, and why."""

    reason: str


def read_json(file: BinaryIO, path: str) -> NumberedRows:
    """Yield the rows of a JSON array or of JSON lines, told apart by their beginning, whatever the suffix says.

    Lines that are lists of messages, one conversation a line, begin like an array, but the first is one by itself.
    """
    text.begin(file, path)
    start, first = file.tell(), b""
    while not first and (data := file.read(text.CHUNK)):
        first = data.lstrip(_BLANK.encode())[:1]
    if not first:
        raise DataError(f"{path}: the file is empty, it contains 0 rows")
    file.seek(start)
    is_array = first == b"["
    if is_array and (line := file.readline(text.CHUNK)).endswith(b"\n"):
        is_array = not _is_conversation(line) or file.read(1) != b"["
    file.seek(start)
    yield from _read_array(file, path) if is_array else _read_lines(file, path)


def _is_conversation(line: bytes) -> bool:
    """Return whether a line is a whole list of messages."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in value)


class _Decoder(json.JSONDecoder):
    """The standard decoder; a value that it reads in some way, but that is no good JSON, becomes a `Bad`."""

    def __init__(self) -> None:
        numbers: dict[str, Any] = {"parse_int": self._integer, "parse_float": self._fraction}
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant, **numbers)
        self._flaws: list[str] = []

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Return the value at an offset, and where it ends."""
        self._flaws.clear()
        value, end = super().raw_decode(s, idx)
        return (Bad(self._flaws[0]) if self._flaws else value), end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self._flaws.append(f"the key {twice!r} is given twice in one object; remove one of them")
        return row

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python reads at most 4300 digits
            self._flaws.append(f"a number of {len(digits)} digits; write it as a text")
            return 0

    def _fraction(self, digits: str) -> float:
        number = float(digits)
        if math.isinf(number):
            self._flaws.append(f"the number {digits[:20]} is too large; write it as a text")
        return number

    def _constant(self, name: str) -> None:
        self._flaws.append(f"{name} is not JSON; write null or a number")


# ----------------------------------------------------------------------------------------------------------- lines


def _read_lines(file: BinaryIO, path: str) -> NumberedRows:
    decoder, first = _Decoder(), True
    for number, line in text.lines(file, path):
        line = line.rstrip(_BLANK)
        if line:
            _check_values(line, path, number)
            yield number, _decoded(decoder, line, file if first else None, path)
            first = False


def _decoded(decoder: _Decoder, line: str, file: BinaryIO | None, path: str) -> Any:
    """Return the value on a line, or a Bad; `file` is given for the first one, which may begin a longer object."""
    try:
        return decoder.decode(line)
    except RecursionError:
        return Bad("nested too deeply")
    except json.JSONDecodeError as error:
        if error.pos < len(line) and not error.msg.startswith("Unterminated string"):
            near = line[error.pos : error.pos + 40]
            return Bad(f"not JSON at column {error.colno}: {error.msg}, near {near!r}")
        if file:
            _refuse_one_object(line, file, path)
        return Bad(f"not JSON: the line ends inside the row, at column {len(line) + 1} (truncated?)")


def _refuse_one_object(line: str, file: BinaryIO, path: str) -> None:
    """Raise DataError if the file is one object over several lines."""
    start = file.tell()
    try:
        whole = json.loads(line + "\n" + file.read(_OBJECT).decode())
    except (ValueError, RecursionError):
        file.seek(start)
        return
    keys = ", ".join(map(repr, whole))[:120]
    raise DataError(f"{path}: one object ({keys}), not a list of rows; write [{{...}}, {{...}}], or one row on a line")


def _check_values(value: str, path: str, number: int) -> None:
    """Raise DataError for a large row, or beginning of one, that would take many times its size in memory."""
    if len(value) > _LARGE and sum(map(_TEXT.sub("", value).count, ",[{")) > _MOST_VALUES:
        raise DataError(f"{path}:{number}: this row has more than {_MOST_VALUES:,} values; divide it, or leave it out")


# ----------------------------------------------------------------------------------------------------------- array


def _read_array(file: BinaryIO, path: str) -> NumberedRows:
    """Yield the values of a JSON array without holding more of it than the value at hand."""
    window, decoder, number = Window(file, path), _Decoder(), 0
    while "[" not in window.text:
        window.offset = len(window.text)
        window.more(1)
    window.offset = window.text.index("[") + 1
    while True:
        gap = (_COMMA if number else _GAP).match(window.text, window.offset)
        assert gap is not None  # it may be empty
        start = gap.end()
        if _is_cut(window, start):
            window.more(number + 1)
            continue
        closed, comma = window.text.startswith("]", start), "," in gap[0]
        if closed and not comma:
            _refuse_more(window, start + 1, path)
            return
        if number and not comma:
            raise _broken(window, start, path, number, "a comma or ] is missing after this row")
        if closed:
            raise _broken(window, start, path, number, "a row is missing after the comma")
        try:
            value, end = decoder.raw_decode(window.text, start)
        except json.JSONDecodeError as error:
            if _is_cut(window, len(window.text) if error.msg.startswith("Unterminated string") else error.pos):
                _check_values(window.text[start:], path, number + 1)
                window.more(number + 1)
                continue
            raise _broken(window, error.pos, path, number + 1, error.msg) from None
        except RecursionError:
            raise DataError(f"{path}:{number + 1}: nested too deeply") from None
        if _is_cut(window, end):
            window.more(number + 1)
            continue
        if end - start > text.MAX_ROW // 4:
            window.check(window.text[start:end], number + 1)
        window.offset = end
        number += 1
        yield number, value


def _is_cut(window: Window, offset: int) -> bool:
    """Return whether the text at an offset may read otherwise once more of the file is read."""
    return not window.ended and offset + _LONGEST_WORD > len(window.text)


def _refuse_more(window: Window, offset: int, path: str) -> None:
    """Raise DataError if there is anything but white space behind the list."""
    window.offset = offset
    while not window.ended and not window.text[window.offset :].strip(_BLANK):
        window.offset = len(window.text)
        window.more(0)
    if rest := window.text[window.offset :].strip(_BLANK):
        line, column = window.position(window.text.index(rest[0], window.offset))
        raise DataError(f"{path}: not JSON at line {line}, column {column}: more stands after the list")


def _broken(window: Window, offset: int, path: str, number: int, message: str) -> DataError:
    """Return the error about a list that is broken at an offset, in or after row `number`."""
    near = window.text[offset : offset + 40]
    line, column = window.position(offset)
    if message.startswith("Unterminated string") or not near.strip(_BLANK):
        return DataError(f"{path}:{number}: not JSON: the file ends inside row {number}, line {line} (truncated?)")
    return DataError(f"{path}:{number}: not JSON at line {line}, column {column}: {message}, near {near!r}")
