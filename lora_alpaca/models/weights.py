"""Safetensors files: is one sound, and tensors to bytes."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes


def weights_damage(path: Path) -> str:
    """Return what is wrong with a safetensors file, as a predicate, or nothing: its header is read, and its size."""
    pointer = b"version https://git-lfs"
    try:
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


def as_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return tensors as a safetensors file; the mark "pt" is what transformers and PEFT look for."""
    return tensors_to_bytes(dict(tensors), metadata={"format": "pt"})
