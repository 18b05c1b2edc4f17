"""Files and hub datasets to raw rows, strictly: exact texts, true numbers, and a reason for everything that is wrong.

A reader yields (number, value) one by one, so that a file of any size can be read; the number is the line of a .jsonl
or .csv file and the position in the list elsewhere, from 1. A value is a `Bad` where this row alone is spoilt.
"""

import csv
import gzip
import io
import logging
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lora_alpaca.data.readers import text
from lora_alpaca.data.readers.json_rows import Bad, NumberedRows, read_json
from lora_alpaca.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


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
    except (OSError, EOFError, zlib.error) as error:  # the last two: of a .gz that is cut short or damaged
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or _first_line(error)}") from None


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        there = path.exists() or path.is_symlink()
        raise DataError(f"{path}: " + ("not a regular file" if there else "no such file"))
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _read_csv(file: BinaryIO, path: str) -> NumberedRows:
    """Yield the records of a table with a header; every value is text."""
    csv.field_size_limit(sys.maxsize)
    text.begin(file, path)
    reader, line = csv.reader((line for _, line in text.lines(file, path)), strict=True), 1
    header: list[str] = []
    try:
        for record in reader:
            if record and not header:
                header = record
                if len(set(header)) < len(header):
                    raise DataError(f"{path}: the header has a column name twice: {', '.join(map(repr, header))}")
            elif record and len(record) != len(header):
                yield line, Bad(f"{len(record)} columns, and the header has {len(header)}")
            elif record:
                yield line, dict(zip(header, record, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {str(error).partition(' - ')[0]}") from None
    if not header:
        raise DataError(f"{path}: the file is empty, it contains 0 rows")


def _read_parquet(file: BinaryIO, path: str) -> NumberedRows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        for batch in table.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, ValueError) as error:  # ValueError: of a text that is not UTF-8, for example
        after = f", after row {number}" if number else ""
        raise DataError(f"{path}: not a Parquet file that can be read{after} ({_first_line(error)})") from None


_READERS: dict[str, Callable[[BinaryIO, str], NumberedRows]] = {
    ".json": read_json,
    ".jsonl": read_json,
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
    for library in ("datasets", "huggingface_hub"):  # which tell of every attempt; ours is one line
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(
            parts["id"], parts["config"] or None, split=parts["split"] or "train", revision=parts["revision"]
        )
    except Exception as error:  # the hub's many errors have no common base; the user needs the name and the reason
        raise DataError(
            f"--data_path {source}: not a local file, and the hub gives none ({_first_line(error)}); pass a .json file"
        ) from None
    yield from enumerate(rows, start=1)
