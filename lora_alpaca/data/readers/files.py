"""Files and hub datasets to raw rows, strictly: exact texts, true numbers, and a reason for everything that is wrong.

A reader yields (number, value) one by one, so that a file of any size can be read; the number is the line of a .jsonl
or .csv file and the position in the list elsewhere, from 1. A value is a `Bad` where this row alone is spoilt.
"""

import logging
import re
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from lora_alpaca.data.readers import text
from lora_alpaca.data.readers.json_rows import Bad, NumberedRows, read_json
from lora_alpaca.data.readers.tables import read_table
from lora_alpaca.data.readers.unpacking import unpacked
from lora_alpaca.errors import DataError, first_line

Note = Callable[[str], None]


def suffix(path: Path) -> str:
    """Return the suffix that says how to read a file, in lower case and without .gz; empty if there is none of ours."""
    kinds = [kind.lower() for kind in path.suffixes]
    kind = kinds[-2] if len(kinds) > 1 and kinds[-1] == ".gz" else kinds[-1] if kinds else ""
    return kind if kind in SUFFIXES else ""


def read_file(path: Path, note: Note = lambda line: None) -> NumberedRows:
    """Yield the rows of a file of one of SUFFIXES, .gz or not. DataError is about the file as a whole.

    `note` is called with lines on what is good to know, without the file's name.
    """
    try:
        with _opened(path) as file:
            yield from _READERS[suffix(path)](file, str(path), note)
    except (OSError, EOFError, zlib.error) as error:  # the last two: of a .gz that is cut short or damaged
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or first_line(error)}") from None


def _opened(path: Path) -> BinaryIO:
    if not path.is_file():
        there = path.exists() or path.is_symlink()
        raise DataError(f"{path}: " + ("not a regular file" if there else "no such file"))
    file = open(path, "rb")  # noqa: SIM115  # the caller closes it
    return unpacked(file, str(path)) if path.suffix.lower() == ".gz" else file


def _read_json(file: BinaryIO, path: str, note: Note) -> NumberedRows:
    return read_json(file, path)


def _read_document(file: BinaryIO, path: str, note: Note) -> NumberedRows:
    """Yield the one row of a file of plain text: the document that it is, exactly as it stands there."""
    document = text.whole(file, path)
    yield 1, {"text": document} if document.strip() else Bad("the file is empty")


def _read_parquet(file: BinaryIO, path: str, note: Note) -> NumberedRows:
    from lora_alpaca.data.readers import arrow_rows  # pyarrow takes a while to import

    return arrow_rows.read_parquet(file, path, note)


def _read_arrow(file: BinaryIO, path: str, note: Note) -> NumberedRows:
    from lora_alpaca.data.readers import arrow_rows

    return arrow_rows.read_arrow(file, path, note)


_READERS: dict[str, Callable[[BinaryIO, str, Note], NumberedRows]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": read_table,
    ".tsv": partial(read_table, usual="\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_document,
    ".md": _read_document,
}
SUFFIXES = tuple(_READERS)
DOCUMENTS = (".txt", ".md")

_COMMIT = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")  # in the address of a file
_HUB = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^:@]*))?(:(?P<split>[^@]+))?(@(?P<revision>.+))?")


def hub_id(source: str) -> re.Match[str] | None:
    """Return the parts of `ID[:CONFIG][:SPLIT][@REVISION]`: id, config, split and revision, None where not given."""
    return _HUB.fullmatch(source)


def read_hub(source: str, at_commit: Note) -> NumberedRows:
    """Yield the rows of a dataset on the hub, or of its complete cache; of the train split unless another is named.

    Its commit goes to `at_commit`, where the files that were downloaded tell it.
    """
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
            f"--data_path {source}: not a local file, and the hub gives none ({first_line(error)}); pass a .json file"
        ) from None
    downloaded = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    for commit in [match[1] for address in downloaded if (match := _COMMIT.search(address))][:1]:
        at_commit(commit)
    yield from enumerate(rows, start=1)
