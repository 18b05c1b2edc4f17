"""Where and in what precision a model computes: the one table of devices, dtypes and bits."""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_alpaca.config.shared import ModelOptions
from lora_alpaca.errors import ConfigError, ModelError
from lora_alpaca.models import cards, quantization

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class DeviceSpec:
    """Where a model runs and in what precision: device, compute dtype, and 8, 4 or 16 bits for the frozen base.

    `kind` names the bits where the base is stored quantised already.
    """

    device: torch.device
    dtype: torch.dtype
    bits: int
    kind: str = ""

    @property
    def dtype_name(self) -> str:
        """Return the compute dtype as --dtype has it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def __str__(self) -> str:
        return f"{self.kind or quantization.BITS[self.bits]} base, {self.dtype_name} compute on {self.device.type}"


def choose_device(
    options: ModelOptions, device: torch.device | None = None, default_bits: int = 16
) -> tuple[DeviceSpec, list[str]]:
    """Return where and how to compute, and a note for everything that is not available as asked.

    `device` is what a launcher has already chosen. Raises ConfigError for a device that is not there or is too old,
    ModelError where bitsandbytes is needed and is not.
    """
    device = device or pick_device(options.device)
    notes: list[str] = []
    if device.type == "cpu" and options.device == "auto" and (reason := cards.unused()):
        notes.append(f"the NVIDIA card of this machine is not used: {reason}")
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
        notes.append("no GPU is used: a quantised base works on a CPU, and is slow")
    return DeviceSpec(device, DTYPES[dtype], bits), notes


def as_stored(spec: DeviceSpec, config: Any, name: str, options: ModelOptions) -> tuple[DeviceSpec, list[str]]:
    """Return how to hold the base of a config and a name: as it is stored, where that is quantised; and a note on it.

    Raises ModelError for a kind that cannot be trained on, ConfigError for options that ask for other bits.
    """
    found, remedy = quantization.stored(config), "name the model that it was quantised from"
    if found is None:
        return spec, []
    if not found.bits:
        raise ModelError(
            f"--base_model {name} is stored quantised by {found.kind}; only 4 and 8 bits of bitsandbytes can be "
            f"trained on; {remedy}"
        )
    flag, bits = ("load_4bit", 4) if options.load_4bit else ("load_8bit", 8 if options.load_8bit else 16)
    if options.is_set(flag) and getattr(options, flag) is not None and bits != found.bits:
        raise ConfigError(
            f"--{flag} {getattr(options, flag)}: {name} is stored as {found.kind}; leave the flag out, or {remedy}"
        )
    if spec.device.type == "mps":
        raise ModelError(f"--base_model {name} is stored as {found.kind}, which mps cannot hold; {remedy}")
    quantization.require_bitsandbytes(found.bits, remedy)
    note = f"the base is stored as {found.kind} and held so; export merges into the model that it was quantised from"
    return replace(spec, bits=found.bits, kind=found.kind), [note]


def pick_device(name: str) -> torch.device:
    """Return the asked device, or for `auto` the first there is of cuda, mps, cpu.

    Raises ConfigError for one that is not there, and for a card that is too old, or too new for this torch.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA initialization", UserWarning)  # it is told in our own line
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        found = ", ".join(device for device, available in there.items() if available)
        reason = cards.unused() if name == "cuda" else ""
        because = f"; this machine has a card: {reason}" if reason else ""
        raise ConfigError(f"--device {name}: torch sees no such device here; it sees {found}{because}")
    device = torch.device(name)
    if name == "cuda":
        cards.require_able(device)
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 natively, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False
