"""Compressed files, with a limit to what they grow to: an archive of a megabyte may hold gigabytes."""

import gzip
import io
import tempfile
from typing import Any, BinaryIO

from lora_alpaca.errors import DataError

GROWTH = 200  # times; rows of text compress to a tenth, hardly ever to a hundredth
FREE = 256 << 20  # bytes that any archive may grow to
MAX_COPY = 4 << 30  # bytes of an unpacked copy on the disk, for a kind of file that is not read from front to back


def check_growth(size: int, packed: int, path: str) -> None:
    """Raise DataError if a file of `packed` bytes grows to more than it may."""
    if size > FREE and size > GROWTH * packed:
        raise DataError(f"{path}: grows to more than {GROWTH} times its size; unpack it yourself if you trust it")


class Unpacked(io.RawIOBase):
    """The content of a .gz file as a stream that can be sought in."""

    def __init__(self, packed: BinaryIO, path: str):
        self._packed, self._path = packed, path
        self._gzip = gzip.GzipFile(fileobj=packed)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, and return how many bytes it took; DataError where the file grows too much."""
        count = self._gzip.readinto(buffer)
        check_growth(self._gzip.tell(), self._packed.tell(), self._path)
        return count

    def readable(self) -> bool:
        """Return True, for what reads in pieces."""
        return True

    def seekable(self) -> bool:
        """Return True; going back unpacks anew from the beginning."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position of the content."""
        return self._gzip.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in the content."""
        return self._gzip.tell()

    def close(self) -> None:
        """Close the packed file too."""
        self._gzip.close()
        self._packed.close()
        super().close()


def unpacked(packed: BinaryIO, path: str) -> BinaryIO:
    """Return the content of an open .gz file."""
    return io.BufferedReader(Unpacked(packed, path), 1 << 17)


def on_disk(file: BinaryIO, path: str) -> BinaryIO:
    """Return a file that is on the disk: itself, or a copy without a name of what a .gz file holds."""
    if not isinstance(getattr(file, "raw", None), Unpacked):
        return file
    copy, size = tempfile.TemporaryFile(), 0  # noqa: SIM115  # the caller closes it
    try:
        while data := file.read(1 << 20):
            size += len(data)
            if size > MAX_COPY:
                raise DataError(f"{path}: grows to more than {MAX_COPY >> 30} GB; unpack it first, with gunzip")
            copy.write(data)
    except BaseException:
        copy.close()
        raise
    copy.seek(0)
    return copy
