"""Tables with a header to raw rows: commas, semicolons, tabs or bars between, as spreadsheets and pandas write them."""

import csv
from collections.abc import Callable, Iterator
from typing import BinaryIO

from lora_alpaca.data.readers import text
from lora_alpaca.data.readers.json_rows import Bad, NumberedRows
from lora_alpaca.errors import DataError

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_DECLARED = "sep="  # a first line of Excel's own, which names the separator


def read_table(file: BinaryIO, path: str, note: Callable[[str], None], usual: str = ",") -> NumberedRows:
    """Yield the records of a table; every value is text. Blank ones are left out, and noted.

    `usual` stands between the columns, unless the header is divided by another separator alone. A column without a
    name is called `Unnamed: N`, as pandas does, and is left out of rows in which it is empty.
    """
    csv.field_size_limit(text.MAX_ROW)
    text.begin(file, path)
    separator = _separator(file, path, usual)
    header: list[str] = []
    unnamed: set[str] = set()
    blank = 0
    for line, record in _records(file, path, separator):
        if not any(cell.strip() for cell in record):
            blank += bool(record)
        elif not header and record[0].lower().startswith(_DECLARED) and not any(record[1:]):
            continue
        elif not header:
            header = [name if name.strip() else f"Unnamed: {column}" for column, name in enumerate(record)]
            unnamed = {name for name, given in zip(header, record, strict=True) if name != given}
            if len(set(header)) < len(header):
                names = ", ".join(map(repr, header[:100]))
                raise DataError(f"{path}: the header has a column name twice: {names[:500]}")
        elif len(record) != len(header):
            between = f", with {_SEPARATORS[separator]} between"
            yield line, Bad(f"{len(record)} columns, and the header has {len(header)}{between}")
        else:
            row = dict(zip(header, record, strict=True))
            yield line, {key: row[key] for key in row if key not in unnamed or row[key].strip()} if unnamed else row
    if not header:
        raise DataError(f"{path}: the file is empty, it contains 0 rows")
    if blank:
        note(f"{blank} blank row{'s are' if blank > 1 else ' is'} left out")


def _separator(file: BinaryIO, path: str, usual: str) -> str:
    """Return what stands between the columns: the usual separator, unless only another one divides the header."""
    start = file.tell()
    first = next((line for _, line in text.lines(file, path) if line.strip()), "").strip("\r\n")
    file.seek(start)
    declared = first[len(_DECLARED) :] if first.lower().startswith(_DECLARED) else ""
    if declared in _SEPARATORS:
        return declared
    dividing = [mark for mark in _SEPARATORS if _divides(mark, first)]
    return dividing[0] if len(dividing) == 1 else usual


def _divides(mark: str, header: str) -> bool:
    try:
        return mark in header and len(next(csv.reader([header], delimiter=mark))) > 1
    except csv.Error:
        return False


def _records(file: BinaryIO, path: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the records with the lines on which they begin; a blank line is an empty one."""
    lines = _Lines(file, path)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        while True:
            lines.begin(reader.line_num + 1)
            record = next(reader)
            yield lines.first, record
    except StopIteration:
        return
    except csv.Error as error:
        raise DataError(f"{path}:{lines.first}: not CSV: {str(error).partition(' - ')[0]}") from None


class _Lines:
    """The lines of a table, so that a record of many lines is no longer than a row may be."""

    def __init__(self, file: BinaryIO, path: str):
        self._lines, self._path = text.lines(file, path), path
        self.first, self._size = 1, 0

    def begin(self, first: int) -> None:
        """Begin a record on the line `first`."""
        self.first, self._size = first, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        self._size += len(line)
        if self._size > text.MAX_ROW:
            raise text.too_long(self._path, self.first)
        return line
