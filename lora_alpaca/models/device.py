"""Where and in what precision a model computes: the one table of devices, dtypes and bits."""

from dataclasses import dataclass

import torch

from lora_alpaca.config.shared import ModelOptions
from lora_alpaca.errors import ConfigError
from lora_alpaca.models import quantization

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class DeviceSpec:
    """Where a model runs and in what precision: device, compute dtype, and 8, 4 or 16 bits for the frozen base."""

    device: torch.device
    dtype: torch.dtype
    bits: int

    def __str__(self) -> str:
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return f"{quantization.BITS[self.bits]} base, {name} compute on {self.device.type}"


def choose_device(
    options: ModelOptions, device: torch.device | None = None, default_bits: int = 16
) -> tuple[DeviceSpec, list[str]]:
    """Return where and how to compute, and a note for everything that is not available as asked.

    `device` is what a launcher has already chosen. Raises ConfigError for a device that is not there, ModelError where
    bitsandbytes is needed and is not.
    """
    device = device or pick_device(options.device)
    notes: list[str] = []
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    elif dtype == "bf16" and not has_bf16(device):
        dtype = "fp16" if device.type == "cuda" else "fp32"
        notes.append(f"bf16 is not native on {device}: {dtype} is used")
    elif dtype == "fp16" and device.type == "cpu":
        dtype = "fp32"
        notes.append("fp16 is too slow and too narrow to train on a CPU: fp32 is used")
    bits = 4 if options.load_4bit else 8 if options.load_8bit else default_bits if options.load_8bit is None else 16
    if bits != 16 and device.type == "mps":
        bits = 16
        notes.append("bitsandbytes cannot quantise on mps: the base is left unquantised")
    if bits != 16:
        quantization.require_bitsandbytes(bits)
    if bits != 16 and device.type == "cpu":
        notes.append(f"no GPU is used: a base in {bits} bits works on a CPU, and is slow")
    return DeviceSpec(device, DTYPES[dtype], bits), notes


def pick_device(name: str) -> torch.device:
    """Return the asked device, or for `auto` the first there is of cuda, mps, cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        found = ", ".join(device for device, available in there.items() if available)
        raise ConfigError(f"--device {name}: torch sees no such device here; it sees {found}")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 natively, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False
