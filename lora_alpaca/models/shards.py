"""Safetensors files: read tensor by tensor as they lie on the disk, and written as the tensors come.

What is read is mapped, so that memory holds pages that the system can take back. What is written is hashed beside.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.models.base import INDEX, ONE_FILE
from lora_alpaca.models.weights import DTYPES, MappedFile, TensorInfo
from lora_alpaca.storage import atomic
from lora_alpaca.storage.handles import NO_LINK
from lora_alpaca.storage.hashing import Hashing

NAMES = {dtype: name for name, dtype in DTYPES.items()}


AT_ONCE = 64 * 2**20  # bytes that the disk is given at a time


class Shards:
    """The tensors of safetensors files, by name, in the order in which they lie there."""

    def __init__(self, files: Sequence[Path]):
        self._files = [MappedFile(path) for path in files]
        self._where = {name: file for file in self._files for name in file.infos}
        self.infos = {name: TensorInfo(*file.infos[name]) for name, file in self._where.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, a view of its mapped file."""
        return self._where[name].read(name)


def sharded(infos: Mapping[str, TensorInfo], most: int) -> dict[str, list[str]]:
    """Return file -> names of the tensors in it, no file over `most` bytes but for a tensor that is larger alone."""
    files: list[list[str]] = [[]]
    taken = 0
    for name, info in infos.items():
        if files[-1] and taken + info.nbytes > most:
            files.append([])
            taken = 0
        files[-1].append(name)
        taken += info.nbytes
    if len(files) == 1:
        return {ONE_FILE: files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": names for number, names in enumerate(files, 1)}


class ShardWriter:
    """Writes safetensors files into a folder, tensor after tensor in the order of their infos.

    `file_hashes` are file -> sha256, once they are finished.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], most: int):
        self.folder, self._infos = folder, infos
        self.files = sharded(infos, most)
        self._left: Iterator[tuple[str, str]] = iter([(f, name) for f, names in self.files.items() for name in names])
        self._open = ""
        self._descriptor = -1
        self._flushing = ThreadPoolExecutor(1)
        self._flushed: Future[None] | None = None
        self._unflushed = 0
        self._hashes = Hashing()
        self.file_hashes: dict[str, str] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor. A view of a mapped file is copied from there."""
        file, expected = next(self._left)
        assert name == expected, f"{name} is written where {expected} belongs"
        if file != self._open:
            self._close()
            self._begin(file)
        data = as_bytes(tensor)
        self._put(data)
        self._hashes.add(file, data)

    def finish(self) -> None:
        """Close the files, flushed, and write the index of several."""
        self._close()
        self._flushing.shutdown()
        self.file_hashes = self._hashes.finish()
        if len(self.files) > 1:
            total = sum(info.nbytes for info in self._infos.values())
            placed = {name: file for file, names in self.files.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
            atomic.write(self.folder / INDEX, atomic.as_json(index))

    def _begin(self, file: str) -> None:
        self._open = file
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK
        self._descriptor = os.open(self.folder / file, flags, 0o666)
        header = header_of({name: self._infos[name] for name in self.files[file]})
        self._put(memoryview(header))
        self._hashes.add(file, memoryview(header))

    def _put(self, data: memoryview) -> None:
        """Write data. The disk is told to begin now and then, so that it is at work meanwhile."""
        self._unflushed += data.nbytes
        while data:
            data = data[os.write(self._descriptor, data) :]
        if self._unflushed > AT_ONCE and (self._flushed is None or self._flushed.done()):
            self._wait()
            self._flushed, self._unflushed = self._flushing.submit(os.fsync, self._descriptor), 0

    def _wait(self) -> None:
        """Wait for the disk. Raises OSError where it could not write."""
        if self._flushed is not None:
            flushed, self._flushed = self._flushed, None
            flushed.result()

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                self._wait()
            finally:
                os.close(descriptor)


def header_of(infos: Mapping[str, TensorInfo]) -> bytes:
    """Return the header of a safetensors file with these tensors, one behind another."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in infos.items():
        found[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return struct.pack("<Q", len(text)) + text


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy of a contiguous one."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
