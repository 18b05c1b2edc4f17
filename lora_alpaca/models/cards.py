"""What a CUDA card, its driver and this build of torch can do together, and how torch is set up for it.

All of it is told in one line before anything is loaded: torch itself would say "no kernel image is available" in the
middle of the first step, or see no card at all.
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from lora_alpaca.errors import ConfigError

OLDEST = (7, 5)  # Turing: int8 products of bitsandbytes; kernels of FlexAttention
AMPERE = (8, 0)  # the first that multiplies in tf32
EXPANDABLE = "expandable_segments:True"
SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
OVERRIDE = "NVIDIA_TF32_OVERRIDE"  # of the card's own libraries: 0 forbids tf32


def require_able(device: torch.device) -> None:
    """Raise ConfigError where a card is too old, or this build of torch has no kernels for it."""
    if torch.version.hip:
        return
    capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    of_card = f"--device cuda: {name} has compute capability {_dotted(capability)}"
    if capability < OLDEST:
        raise ConfigError(f"{of_card}, and {_dotted(OLDEST)} is needed (Turing, of 2018, or newer); say --device cpu")
    built = torch.cuda.get_arch_list()
    if built and not _has_kernels(capability, built):
        raise ConfigError(
            f"{of_card}, and torch {torch.__version__} has kernels for {', '.join(built)}; install a torch that is "
            "built for this card (https://pytorch.org/get-started/locally), or say --device cpu"
        )


def _has_kernels(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Return whether one of `sm_86`, `compute_90`, ... serves: a card runs those of its generation up to its own.

    Of what is built as `compute`, the driver makes kernels for every later card. A letter binds to the one card.
    """
    for kind, major, minor, bound in re.findall(r"(sm|compute)_(\d+)(\d)([a-z]?)", " ".join(built)):
        found, serves_later = (int(major), int(minor)), kind == "compute" or int(major) == capability[0]
        if found == capability or (not bound and serves_later and found < capability):
            return True
    return False


def unused() -> str:
    """Return why torch sees no card though the driver has one; an empty text where there is none, or it is seen."""
    if (
        torch.version.hip
        or torch.cuda.is_available()
        or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    ):
        return ""
    version = driver_version()
    if version is None:
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install one that is built with it"
    needed = tuple(map(int, torch.version.cuda.split(".")[:2]))
    if version[0] < needed[0]:  # within a generation of CUDA, drivers serve what is newer
        return (
            f"its driver is for CUDA {_dotted(version)} at most, and torch {torch.__version__} is built for CUDA "
            f"{torch.version.cuda}; update the driver, or install a torch for CUDA {version[0]}"
        )
    return f"torch {torch.__version__} cannot use it; see nvidia-smi"


def driver_version() -> tuple[int, int] | None:
    """Return the version of CUDA that the driver of this machine's cards serves, None where it has no card."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        number, cards = ctypes.c_int(), ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(number)) or driver.cuInit(0):
            return None
        if driver.cuDeviceGetCount(ctypes.byref(cards)) or not cards.value:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


# ------------------------------------------------------------------------------------------------------------ settings


def expand_segments() -> None:
    """Let memory that is freed serve for larger pieces later, unless the environment says how it is allocated.

    Packs differ in length from step to step, and the rest of each would be left over in its segment.
    """
    if sys.platform != "linux" or any(os.environ.get(name) for name in SETTINGS):
        return
    with suppress(RuntimeError, AttributeError):  # another allocator is in use, or another torch
        torch._C._accelerator_setAllocatorSettings(EXPANDABLE)


def multiplies_in_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether fp32 products are rounded to tf32, 10 bits of fraction: eight times as fast, from Ampere on."""
    if device.type != "cuda" or dtype != torch.float32 or torch.version.hip or os.environ.get(OVERRIDE) == "0":
        return False
    return torch.cuda.get_device_capability(device) >= AMPERE


@contextmanager
def fp32_products(in_tf32: bool) -> Iterator[None]:
    """Within this context, fp32 products are computed in tf32, or exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if in_tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
