"""Parquet and Arrow files to raw rows, some at a time, with a limit to each row and to what a file grows to.

A text that a file holds once and repeats by its number is held once here too, until its row is made.
"""

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet
from pyarrow import types

from lora_alpaca.data.readers import text
from lora_alpaca.data.readers.json_rows import Bad, NumberedRows
from lora_alpaca.data.readers.unpacking import check_growth, on_disk
from lora_alpaca.errors import DataError

_ROWS = 1000  # of a batch
_BATCH = 64 << 20  # bytes of a batch that is made into rows at once
_VALUE = 50  # bytes that a value takes as a Python object, besides its text
_MAGIC = b"ARROW1\0\0"
Batch = tuple[pyarrow.RecordBatch, pyarrow.Schema]  # and the schema of its rows, without dictionaries


def read_parquet(file: BinaryIO, path: str, note: Callable[[str], None]) -> NumberedRows:
    """Yield the rows of a Parquet file."""
    text.refuse_foreign(file, path, own=b"PAR1")
    with on_disk(file, path) as plain:
        yield from _read(plain, _parquet_batches(plain, path), path, "a Parquet")


def read_arrow(file: BinaryIO, path: str, note: Callable[[str], None]) -> NumberedRows:
    """Yield the rows of an Arrow file or stream, which is what `save_to_disk` of datasets writes."""
    text.refuse_foreign(file, path, own=b"ARROW1")
    with on_disk(file, path) as plain:
        yield from _read(plain, _arrow_batches(plain, path), path, "an Arrow")


def _read(file: BinaryIO, batches: Iterator[Batch], path: str, kind: str) -> NumberedRows:
    packed = os.fstat(file.fileno()).st_size
    number = grown = 0
    try:
        for batch, schema in batches:
            for part, size in _parts(batch):
                grown += size
                check_growth(grown, packed, path)
                long = part.num_rows == 1 and size > text.MAX_ROW
                for row in [Bad(text.TOO_LONG)] if long else part.cast(schema).to_pylist():
                    number += 1
                    yield number, row
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError, struct.error) as error:  # ValueError: of a text that is not UTF-8
        after = f", after row {number}" if number else ""
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{path}: not {kind} file that can be read{after} ({reason})") from None


def _parts(batch: pyarrow.RecordBatch) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yield a batch with its size, or row by row where it is large."""
    size = _size(batch.to_struct_array())
    if size <= _BATCH:
        yield batch, size
        return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        yield row, _size(row.to_struct_array())


def _size(array: pyarrow.Array) -> int:
    """Return about how many bytes the values of an array take as Python objects, or more."""
    kind, size = array.type, _VALUE * len(array)
    if types.is_dictionary(kind) and (types.is_string(kind.value_type) or types.is_binary(kind.value_type)):
        lengths = pyarrow.compute.binary_length(array.dictionary).take(array.indices)
        return size + (pyarrow.compute.sum(lengths).as_py() or 0)
    if types.is_struct(kind):
        return size + sum(map(_size, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind):
        return size + _size(array.flatten())
    if types.is_nested(kind) or types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return (size + array.nbytes) * len(array)  # which may repeat what is stored once
    return int(size + array.nbytes)


# ----------------------------------------------------------------------------------------------------------- Parquet


def _parquet_batches(file: BinaryIO, path: str) -> Iterator[Batch]:
    plain = pyarrow.parquet.ParquetFile(file)
    facts, schema = plain.metadata, plain.schema_arrow
    groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    size = sum(column.total_uncompressed_size for column in columns)
    check_growth(size, sum(column.total_compressed_size for column in columns), path)
    texts = sorted({column.path_in_schema for column in columns if column.physical_type == "BYTE_ARRAY"})
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    source = pyarrow.parquet.ParquetFile(file, read_dictionary=texts, pre_buffer=False, buffer_size=text.CHUNK)
    for batch in source.iter_batches(batch_size=max(1, min(_ROWS, _BATCH // max(1, largest)))):
        yield batch, schema


# ------------------------------------------------------------------------------------------------------------- Arrow


def _arrow_batches(file: BinaryIO, path: str) -> Iterator[Batch]:
    """Yield the batches of a file that is mapped, not read: one may be as large as the file."""
    content = pyarrow.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if content[: len(_MAGIC)].to_pybytes() == _MAGIC:
        content = content.slice(len(_MAGIC))  # the file format is the stream format in a frame
    for message in pyarrow.ipc.MessageReader.open_stream(content):
        if _is_compressed(message.metadata.to_pybytes()):
            raise DataError(f"{path}: an Arrow file with compressed columns; write it without, or as .parquet")
    reader = pyarrow.ipc.open_stream(content)
    for whole in reader:
        whole.validate(full=True)  # numbers in a damaged file may point anywhere
        for first in range(0, whole.num_rows, _ROWS):
            yield whole.slice(first, _ROWS), reader.schema


def _is_compressed(message: bytes) -> bool:
    """Return whether a message of the format, a flatbuffer, is of a batch whose columns are compressed.

    pyarrow does not tell, and takes as much memory as the file says that they grow to.
    """

    def field(table: int, number: int) -> int:
        """Return where a field of a table is, 0 for one that is not given."""
        places = table - struct.unpack_from("<i", message, table)[0]
        given = 4 + 2 * number < struct.unpack_from("<H", message, places)[0]
        offset = struct.unpack_from("<H", message, places + 4 + 2 * number)[0] if given else 0
        return table + offset if offset else 0

    def followed(place: int) -> int:
        return int(place + struct.unpack_from("<I", message, place)[0])

    root = followed(0)
    kind, header = message[field(root, 1)], followed(field(root, 2))
    if kind == 2:  # a dictionary, which has a batch in it
        header = followed(field(header, 1))
    return kind in (2, 3) and field(header, 3) > 0
