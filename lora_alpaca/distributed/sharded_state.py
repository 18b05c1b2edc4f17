"""Tensors that are spread over the ranks: written to a disk, read from it, and brought to the main rank.

On the disk they are safetensors files of torch.distributed.checkpoint, a few for each rank, and no pickle is read. No
rank ever holds the whole: each writes and reads its own part, and what is gathered is one tensor at a time. A tensor is
a DTensor, of which every rank has a shard, or a plain one, which is the same on every rank.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard

from lora_alpaca.distributed.world import World
from lora_alpaca.errors import CheckpointError
from lora_alpaca.storage.handles import NO_LINK

FILE_BYTES = 2**28  # of the largest file, but for a shard that is larger: a rank holds one file twice while it writes
Tensors = Mapping[str, torch.Tensor]
FileFacts = dict[str, dict[str, Any]]  # name -> size and sha256, as a manifest has them


# --------------------------------------------------------------------------------------------------------- on the disk


def write(folder: Path, tensors: Tensors, world: World) -> FileFacts:
    """Write tensors into an empty folder, every rank its part, flushed; return size and sha256 of all ranks' files.

    Every rank calls it, and names the same folder of one file system. Raises OSError on all ranks, naming one of those
    that cannot write.
    """
    writer = HuggingFaceStorageWriter(str(folder), _file_numbers(tensors, world), save_distributed=True)
    writer.fs = files = _NewFiles()
    _together(lambda: save(dict(tensors), storage_writer=writer, no_dist=world.world_size == 1), world)
    return {name: facts for part in world.gather(files.written) for name, facts in part.items()}


def read(folder: Path, tensors: Tensors, world: World) -> None:
    """Fill tensors with what `write` wrote of them, on this number of ranks or another one; every rank calls it.

    Raises CheckpointError where the folder has not all of them, in their shapes.
    """
    found = contents(folder)
    for name, tensor in tensors.items():
        if name not in found or found[name][1] != tuple(tensor.shape):
            has = list(found[name][1]) if name in found else "missing"
            raise CheckpointError(f"{folder}: {name} is {has}, and this run has {list(tensor.shape)}")
    reader = HuggingFaceStorageReader(str(folder))
    _together(lambda: load(dict(tensors), storage_reader=reader, no_dist=world.world_size == 1), world)


def contents(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of the tensors in a folder, by their names. Raises CheckpointError for damaged files."""
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # of safetensors, or of JSON
        raise CheckpointError(f"{folder} cannot be read ({str(error).splitlines()[0]})") from None
    return {name: (one.properties.dtype, tuple(one.size)) for name, one in found.items()}  # type: ignore[union-attr]


def _file_numbers(tensors: Tensors, world: World) -> dict[str, int]:
    """Return for each tensor the number of the file that its shards are in, from 1, on every rank."""
    sizes: dict[str, int] = {}
    for part in world.gather({name: local(tensor).nbytes for name, tensor in tensors.items()}):
        sizes |= {name: max(size, sizes.get(name, 0)) for name, size in part.items()}
    numbers, number, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    return numbers


def _together(call: Callable[[], Any], world: World) -> None:
    """Make a call of torch.distributed.checkpoint, whose errors on any rank are those of all."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is right on one device
            world.collective(call)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise OSError(cause.errno or 0, world.named(rank, cause.strerror or str(cause))) from None
        raise cause from None


class _NewFiles(FileSystem):
    """A file system in which files are new, in folders that are there, and hashed while they are written."""

    def __init__(self) -> None:
        self.written: FileFacts = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Yield a new file; no link is followed to one that is there."""
        with _HashedFile(Path(path)) as stream:
            yield stream
        self.written[Path(path).name] = {"bytes": stream.tell(), "sha256": stream.hash.hexdigest()}

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Make no folder: a rank that does not see the one of the main rank must not write into one of its own."""


class _HashedFile(io.RawIOBase):
    """A new file, and the sha256 of what was written to it."""

    def __init__(self, path: Path):
        self.hash, self._written = hashlib.sha256(), 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        self.hash.update(left)
        while left:
            left = left[os.write(self._descriptor, left) :]
        self._written += size
        return size

    def tell(self) -> int:
        return self._written

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


# --------------------------------------------------------------------------------------------- on the main rank


def gather(
    tensors: Tensors, world: World, consume: Callable[[Iterator[tuple[str, torch.Tensor]]], None], dtype: Any = None
) -> None:
    """Let `consume` have whole tensors on the main rank, one after the other, on the CPU; every rank calls this.

    They come in their order, in `dtype` if one is given: the main rank holds, beside its own part, those that `consume`
    has not let go of, and the others hold no more than theirs. Raises OSError on all ranks where `consume` raises it.
    """
    rows = world.gather({name: _rows(tensor) for name, tensor in tensors.items()})

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            world.broadcast(lambda: True)
            yield name, whole(name, tensor)  # of which nothing is kept here

    def whole(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach().to("cpu", dtype)
        found = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
        begin = 0
        for rank, of_rank in enumerate(rows):
            part = found[begin : begin + of_rank[name]]
            begin += of_rank[name]
            if rank == 0:
                part.copy_(local(tensor))
            elif len(part):
                world.receive(part, rank)
        return found

    def serve() -> None:
        if world.is_main:
            try:
                consume(stream())
            finally:
                world.broadcast(lambda: False)
            return
        for name, tensor in tensors.items():
            if not world.broadcast(lambda: True):
                return  # the main rank has failed
            if isinstance(tensor, DTensor) and rows[world.rank][name]:
                world.send(local(tensor).to(dtype or tensor.dtype))
        world.broadcast(lambda: False)

    world.together(serve)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _rows(tensor: torch.Tensor) -> int:
    """Return how many rows of a sharded tensor this rank gives to the main rank, which takes one of several copies."""
    if not isinstance(tensor, DTensor):
        return 0
    *copies, sharded = tensor.placements
    assert sharded == Shard(0), tensor.placements
    assert all(isinstance(one, Replicate) for one in copies), tensor.placements
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    return 0 if any(place[:-1]) else local(tensor).shape[0]
