"""A file as torch.save writes it, written tensor by tensor: torch.save wants all of them in memory at once.

The format is documented in PyTorch's notes on serialization: an uncompressed zip file of `data.pkl`, which holds names,
dtypes and shapes, of a file for the bytes of each storage, aligned to 64 bytes, and of byte order and version.
"""

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2  # by this name torch.load finds what makes a tensor of a storage

from lora_alpaca.models.shards import as_bytes
from lora_alpaca.models.weights import TensorInfo
from lora_alpaca.storage.handles import NO_LINK

STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
ALIGNMENT = 64  # bytes
_HEADER, _LARGE = 30, 20  # bytes of a zip file before each file's name, and of the sizes of one that may be large
_PADDING = 0x4246  # the number of the extra field that torch pads with


class TorchFileWriter:
    """Writes tensors into a new file, in the order of their infos. `aliases` are further names of some of them."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], aliases: Mapping[str, str]):
        self._left = list(infos.items())[::-1]
        self._keys = {name: str(number) for number, name in enumerate(infos)}
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666), "w+b")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._put("data.pkl", memoryview(self._pickled(infos, aliases)))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor, in the dtype and shape of its info."""
        expected, info = self._left.pop()
        assert (name, *info) == (expected, tensor.dtype, tuple(tensor.shape)), f"{name} is not {expected}, {info}"
        self._put(f"data/{self._keys[name]}", as_bytes(tensor))

    def finish(self) -> None:
        """Write the rest and close the file."""
        assert not self._left, f"{self._left[-1][0]} was not written"
        self._put("byteorder", memoryview(sys.byteorder.encode()))
        self._put("version", memoryview(b"3\n"))
        self._zip.close()
        self._file.close()

    def _put(self, name: str, data: memoryview) -> None:
        entry = zipfile.ZipInfo(f"consolidated/{name}")
        start = self._file.tell() + _HEADER + len(entry.filename) + _LARGE + 4
        padding = -start % ALIGNMENT
        entry.extra = struct.pack("<HH", _PADDING, padding) + b"Z" * padding
        with self._zip.open(entry, "w", force_zip64=True) as file:
            file.write(data)

    def _pickled(self, infos: Mapping[str, TensorInfo], aliases: Mapping[str, str]) -> bytes:
        """Return the pickle of a dict of tensors, each of which names its storage."""
        tensors = {name: _Tensor(_Storage(self._keys[name], info), info) for name, info in infos.items()}
        file = io.BytesIO()
        _Pickler(file, protocol=2).dump(
            OrderedDict(tensors | {alias: tensors[name] for alias, name in aliases.items()})
        )
        return file.getvalue()


class _Storage:
    """Stands for the storage of a tensor, a file in the zip file of which the pickle has the name."""

    def __init__(self, key: str, info: TensorInfo):
        self.id = ("storage", STORAGES[info.dtype], key, "cpu", info.nbytes // info.dtype.itemsize)


class _Tensor:
    """Stands for a contiguous tensor that has a storage for itself."""

    def __init__(self, storage: _Storage, info: TensorInfo):
        self.storage, self.shape = storage, info.shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= size
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, tuple(strides[::-1]), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.id if isinstance(value, _Storage) else None
