"""Files of tensors: safetensors, read and written, and pickles, of which nothing but tensors is read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as tensors_to_bytes

from lora_alpaca.errors import LoraAlpacaError, first_line
from lora_alpaca.models.trainable import State

DTYPES = {  # by their names in safetensors files
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
AT_ONCE = 2**22  # elements that are looked at together
MOST_VIEWS = 4  # times that a pickle may name what it holds; tied weights are named twice


class TensorInfo(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes that the tensor takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def weights_damage(path: Path) -> str:
    """Return what is wrong with a safetensors file, as a predicate, or nothing: its header is read, and its size."""
    pointer = b"version https://git-lfs"
    try:
        if path.exists() and not path.is_file():
            return "is not a plain file; copy or download it again"
        with open(path, "rb") as file:
            start = file.read(len(pointer))
        if not start:
            return "is empty (0 bytes); copy or download it again"
        if start == pointer:
            return "is a git-LFS pointer, not the file itself; fetch it with git lfs pull"
        with safe_open(path, "pt"):
            return ""
    except FileNotFoundError:
        return "is missing"
    except (SafetensorError, OSError) as error:
        return f"cannot be read ({str(error).splitlines()[0]}); copy or download it again"


def load_tensors(path: Path, error: type[LoraAlpacaError]) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file. Raises an error in one line for what is none."""
    if reason := weights_damage(path):
        raise error(f"{path} {reason}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, TypeError) as reason:
        raise error(f"{path} cannot be read ({str(reason).splitlines()[0]}); copy or download it again") from None


class MappedFile:
    """A sound safetensors file, mapped: `infos` are dtype and shape of its tensors by name, in the file's order."""

    def __init__(self, path: Path):
        self._file = safe_open(path, "pt")
        self.infos = {name: self._info(name) for name in self._file.offset_keys()}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, a view of the file that is not to be written to."""
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def _info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        found = self._file.get_slice(name)
        return DTYPES[found.get_dtype()], tuple(found.get_shape())


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; it takes little memory of its own."""
    return all(bool(torch.isfinite(piece).all()) for piece in tensor.reshape(-1).split(AT_ONCE))


def as_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return tensors as a safetensors file; the mark "pt" is what transformers and PEFT look for."""
    return tensors_to_bytes(dict(tensors), metadata={"format": "pt"})


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors, each with memory of its own, as a safetensors file, without a copy of them in memory."""
    save_file(dict(tensors), path, metadata={"format": "pt"})


def pickled_tensors(path: Path) -> State:
    """Return the tensors of a file that torch.save wrote, mapped from the disk where its format allows it.

    Raises ValueError, with what is wrong as a predicate, for a file of anything else; no code in it is run.
    """
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            found = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except Exception as error:  # a damaged or malicious file can raise anything
        raise ValueError(f"holds no plain tensors, or is damaged; not loaded ({first_line(error):.100})") from None
    plain = (torch.Tensor, torch.nn.Parameter)
    if not isinstance(found, dict) or not all(type(n) is str and type(value) in plain for n, value in found.items()):
        raise ValueError("holds something else than tensors by their names; not converted")
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{name} is not a plain tensor; not converted")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # a small file could take all memory
            raise ValueError(f"{name} is larger than what the file holds of it; not converted")
    if sum(tensor.nbytes for tensor in found.values()) > MOST_VIEWS * path.stat().st_size:
        raise ValueError("holds the same tensors under many names; not converted")
    return {name: tensor.detach() for name, tensor in found.items()}
