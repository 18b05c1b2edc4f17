"""Files and hub datasets to raw rows, strictly: exact texts, true numbers, and a reason for everything that is wrong.

A reader yields (number, value) one by one, so that a file of any size can be read; the number is the line of a .jsonl
or .csv file and the place in the list elsewhere, from 1. A value is a `Bad` where this row alone is spoilt.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lora_alpaca.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_CHUNK = 1 << 20  # bytes read at a time
_SPACE = re.compile(r"[ \t\r\n]*")
_COMMA = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")

NumberedRows = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used, and why."""

    reason: str


def suffix(path: Path) -> str:
    """Return the suffix that says how to read a file, in lower case and without .gz; empty if there is none of ours."""
    kinds = [kind.lower() for kind in path.suffixes]
    kind = kinds[-2] if len(kinds) > 1 and kinds[-1] == ".gz" else kinds[-1] if kinds else ""
    return kind if kind in SUFFIXES else ""


def read_file(path: Path) -> NumberedRows:
    """Yield the rows of a .json, .jsonl, .csv or .parquet file, .gz or not. DataError is about the file as a whole."""
    try:
        with _opened(path) as file:
            yield from _READERS[suffix(path)](file, str(path))
    except (OSError, EOFError) as error:  # gzip ends with EOFError where a file is cut short
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        raise DataError(f"{path}: " + ("not a regular file" if path.exists() else "no such file"))
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------------ JSON


def _read_json(file: BinaryIO, path: str) -> NumberedRows:
    """Yield the rows of a JSON array or of JSON lines, told apart by the first character, whatever the suffix says."""
    head: bytes = file.peek(4096)  # type: ignore[attr-defined]  # shows without taking
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
        raise DataError(f"{path}: looks like UTF-16 or UTF-32; convert it to UTF-8")
    if not text:
        text = file.read().lstrip()
        file.seek(0)
    if not text:
        raise DataError(f"{path}: the file is empty")
    yield from _read_array(file, path) if text.startswith(b"[") else _read_lines(file, path)


def _read_lines(file: BinaryIO, path: str) -> NumberedRows:
    for number, line in _lines(file, path):
        if line.strip():
            try:
                yield number, _STRICT.decode(line.strip())
            except (ValueError, RecursionError) as error:
                if number == 1:
                    _refuse_single_object(line, file, path)
                yield number, Bad(_reason(error, line, ends=True))


def _refuse_single_object(line: str, file: BinaryIO, path: str) -> None:
    """Raise DataError if what looks like broken lines is one object over many lines."""
    if line.strip() in ("{", "[") or line.rstrip("\r\n").endswith((",", ":", "{")):
        try:
            whole = json.loads(line + file.read(1 << 26).decode())
        except (ValueError, RecursionError):
            return
        keys = ", ".join(map(repr, whole)) if isinstance(whole, dict) else type(whole).__name__
        raise DataError(f"{path}: one object ({keys}), not a list of rows: [{{...}}, {{...}}], or one row a line")


class _Window:
    """The part of a text file in memory, and where in the file it begins: lines and columns of errors are true."""

    def __init__(self, file: BinaryIO, path: str):
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.place, self.ended = "", 0, False
        self._line, self._column, self._bytes = 1, 1, 0

    def more(self) -> None:
        """Drop what is done with, and read as much again as is still there, at least a chunk."""
        self._advance(self.text[: self.place])
        self.text, self.place = self.text[self.place :], 0
        data = self._file.read(max(_CHUNK, len(self.text)))
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line, _ = self.position(len(self.text))
            line += (b"\0" * pending + data).count(b"\n", 0, error.start)
            at = self._bytes - pending + error.start
            raise DataError(f"{self._path}: not UTF-8 at line {line}, byte {at}") from None
        self._bytes += len(data)
        self.ended = not data

    def position(self, place: int) -> tuple[int, int]:
        """Return line and column in the file of a place in the window."""
        before = self.text[:place]
        lines = before.count("\n")
        return self._line + lines, (len(before) - before.rfind("\n") if lines else self._column + len(before))

    def _advance(self, done: str) -> None:
        lines = done.count("\n")
        self._column = len(done) - done.rfind("\n") if lines else self._column + len(done)
        self._line += lines


def _read_array(file: BinaryIO, path: str) -> NumberedRows:
    """Yield the values of a JSON array without holding more of it than the value at hand."""
    window, number = _Window(file, path), 0
    window.more()
    window.place = window.text.index("[") + 1
    while True:
        separator = (_COMMA if number else _SPACE).match(window.text, window.place)
        assert separator is not None  # it may be empty
        start = separator.end()
        if start + 1 >= len(window.text) and not window.ended:
            window.more()
            continue
        if window.text[start : start + 1] == "]" and "," not in separator[0]:
            rest = window.text[start + 1 :].strip() or file.read().strip()
            if rest:
                line, column = window.position(start + 1)
                raise DataError(f"{path}: not JSON at line {line}, column {column}: more data after the list")
            return
        if number and "," not in separator[0]:
            raise DataError(_spoilt(window, start, path, number, "a comma or ] is missing"))
        try:
            value, window.place = _STRICT.raw_decode(window.text, start)
        except json.JSONDecodeError as error:
            cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(window.text) - 16
            if cut_off and not window.ended:
                window.more()
                continue
            place, message = (
                (len(window.text), "the file ends") if error.pos >= len(window.text) else (error.pos, error.msg)
            )
            raise DataError(_spoilt(window, place, path, number + 1, message)) from None
        except (ValueError, RecursionError) as error:
            value = Bad(_reason(error, "", ends=False))
            if isinstance(error, RecursionError):
                raise DataError(f"{path}:{number + 1}: {value.reason}") from None
            window.place = json.JSONDecoder().raw_decode(window.text, start)[1]
        number += 1
        yield number, value


def _spoilt(window: _Window, place: int, path: str, number: int, message: str) -> str:
    """Return the sentence about a list that is broken at a place, in or before row `number`."""
    line, column = window.position(place)
    if (window.ended and not window.text[place:].strip()) or message.startswith("Unterminated string"):
        return f"{path}:{number}: not JSON: the file ends inside row {number}, line {line} (truncated?)"
    near = window.text[place : place + 40]
    return f"{path}:{number}: not JSON at line {line}, column {column}: {message}, near {near!r}"


def _reason(error: Exception, text: str, ends: bool) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, json.JSONDecodeError):  # raised by the hooks below, or a number of too many digits
        return str(error)
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return f"not JSON at column {error.colno}: {error.msg} (the line ends too early: truncated?)"
    return f"not JSON at column {error.colno}: {error.msg}, near {text[error.pos : error.pos + 40]!r}"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice in one row")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


# ------------------------------------------------------------------------------------------------- tables and hub


def _lines(file: BinaryIO, path: str) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, ends included. Only a newline ends one: U+2028 may stand inside a text."""
    done = 0
    for number, line in enumerate(file, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at line {number}, byte {done + error.start}") from None
        done += len(line)


def _read_csv(file: BinaryIO, path: str) -> NumberedRows:
    """Yield the records of a table with a header; every value is the text that stands there."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in _lines(file, path)), strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise DataError(f"{path}: the file is empty")
        if len(set(header)) < len(header):
            raise DataError(f"{path}: a column name is given twice in the header: {', '.join(header)}")
        line = reader.line_num + 1
        for record in reader:
            if record and len(record) != len(header):
                yield line, Bad(f"{len(record)} columns, and the header has {len(header)}")
            elif record:
                yield line, dict(zip(header, record, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _read_parquet(file: BinaryIO, path: str) -> NumberedRows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        number = 0
        for batch in table.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


_READERS: dict[str, Callable[[BinaryIO, str], NumberedRows]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

_HUB = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:@]*))?(:(?P<split>[^@]+))?(@(?P<revision>.+))?")


def hub_id(source: str) -> re.Match[str] | None:
    """Return the parts of `ID[:CONFIG][:SPLIT][@REVISION]`: id, config, split and revision, None where not given."""
    return _HUB.fullmatch(source)


def read_hub(source: str) -> NumberedRows:
    """Yield the rows of a dataset on the hub, or of its complete cache; of the train split unless another is named."""
    import datasets

    parts = hub_id(source)
    assert parts is not None  # asked before
    try:
        rows = datasets.load_dataset(
            parts["id"], parts["config"] or None, split=parts["split"] or "train", revision=parts["revision"]
        )
    except Exception as error:  # the hub's many errors have no common base; the user needs the name and the reason
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"--data_path {source}: not a local file, and the hub gives none ({reason}); pass a .json file"
        ) from None
    yield from enumerate(rows, start=1)
