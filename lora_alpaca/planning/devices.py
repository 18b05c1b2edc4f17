"""Devices to plan for without having them: what their makers say of them, and how much of it a run gets.

Rates are dense, in tera-operations a second, with sums in fp32. What a run gets of them, `sustained`, is an assumption
of this library, and so is the share of the bandwidth: none of these devices was measured.
"""

from dataclasses import dataclass

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.models.device import DTYPES, DeviceSpec

BANDWIDTH_SHARE = 0.8  # of what memory can move, that kernels which only move get
RESERVED = {"cuda": 700_000_000, "mps": 500_000_000, "cpu": 700_000_000}  # bytes of context, libraries and kernels


@dataclass(frozen=True)
class Device:
    """A device: memory in bytes, bandwidth in bytes a second, multiplications and additions a second by dtype."""

    name: str
    kind: str  # of torch
    memory: float
    bandwidth: float
    bf16: float  # 0 where it has none of its own
    fp16: float
    fp32: float
    int8: float
    sustained: float  # share of these rates that the products of a run get
    source: str

    def rate(self, dtype: torch.dtype) -> float:
        """Return the operations a second that products in a dtype get."""
        by_dtype = {torch.bfloat16: self.bf16, torch.float16: self.fp16, torch.float32: self.fp32}
        return by_dtype[dtype] * self.sustained

    @property
    def overhead(self) -> int:
        """Return the bytes that a process takes before it has any tensor."""
        return RESERVED[self.kind]

    def spec(self, config: FinetuneConfig) -> tuple[DeviceSpec, list[str]]:
        """Return where and how a run computes on this device, and notes on what it has not."""
        notes, dtype = [], config.dtype
        if dtype == "auto":
            dtype = "bf16" if self.bf16 else "fp16" if self.kind == "cuda" else "fp32"
        elif not getattr(self, dtype):
            notes.append(f"{dtype} is not native on {self.name}: {'fp16' if self.kind == 'cuda' else 'fp32'} is used")
            dtype = "fp16" if self.kind == "cuda" else "fp32"
        default = 8 if config.tune == "lora" and config.load_8bit is None else 16
        bits = 4 if config.load_4bit else 8 if config.load_8bit else default
        if bits != 16 and self.kind == "mps":
            bits = 16
            notes.append("bitsandbytes cannot quantise on mps: the base is left unquantised")
        return DeviceSpec(torch.device(self.kind), DTYPES[dtype], bits), notes


def _cuda(
    name: str,
    gigabytes: float,
    per_second: float,
    tera: float,
    int8: float,
    sustained: float,
    source: str,
    *,
    fp32: float,
    bf16: bool = True,
) -> Device:
    rates = {"bf16": tera * 1e12 * bf16, "fp16": tera * 1e12, "fp32": fp32 * 1e12, "int8": int8 * 1e12}
    return Device(name, "cuda", gigabytes * 2**30, per_second * 1e9, **rates, sustained=sustained, source=source)


def _apple(name: str, gigabytes: float, per_second: float, tera: float, source: str) -> Device:
    rates = {"bf16": 0.0, "fp16": tera * 1e12, "fp32": tera * 1e12, "int8": 0.0}
    return Device(name, "mps", gigabytes * 1e9 * 0.75, per_second * 1e9, **rates, sustained=0.6, source=source)


def _cpu(name: str, cores: int, gigabytes: float, per_second: float, source: str) -> Device:
    """Return a CPU with AVX512-BF16, of which torch.mm got 0.43 tera/s in bf16 and 0.09 in fp32 on a core."""
    rates = {"bf16": cores * 0.43e12, "fp16": 0.0, "fp32": cores * 0.09e12, "int8": cores * 0.7e12}
    return Device(name, "cpu", gigabytes * 1e9, per_second * 1e9, **rates, sustained=0.7, source=source)


TABLE = {  # memory GiB, bandwidth GB/s, bf16 and fp16 tera/s, int8 tera/s, share of it that a run gets, source
    "t4": _cuda("T4", 15, 320, 65, 130, 0.35, "NVIDIA, T4 datasheet", bf16=False, fp32=8.1),
    "rtx3060": _cuda("RTX 3060", 12, 360, 25.4, 102, 0.7, "NVIDIA, GA102 whitepaper, by cores and clock", fp32=12.7),
    "rtx3090": _cuda("RTX 3090", 24, 936, 71, 284, 0.7, "NVIDIA, GA102 whitepaper", fp32=35.6),
    "rtx4090": _cuda("RTX 4090", 24, 1008, 165.2, 660.6, 0.7, "NVIDIA, Ada whitepaper", fp32=82.6),
    "rtx5090": _cuda("RTX 5090", 32, 1792, 209.5, 838, 0.7, "NVIDIA, RTX Blackwell whitepaper", fp32=104.8),
    "a10": _cuda("A10", 24, 600, 125, 250, 0.5, "NVIDIA, A10 datasheet", fp32=31.2),
    "l4": _cuda("L4", 24, 300, 121, 242, 0.4, "NVIDIA, L4 datasheet", fp32=30.3),
    "a100-40": _cuda("A100 40 GB", 40, 1555, 312, 624, 0.7, "NVIDIA, A100 datasheet", fp32=19.5),
    "a100-80": _cuda("A100 80 GB", 80, 2039, 312, 624, 0.7, "NVIDIA, A100 datasheet", fp32=19.5),
    "h100": _cuda("H100 SXM", 80, 3350, 989, 1979, 0.6, "NVIDIA, H100 datasheet", fp32=67),
    "h200": _cuda("H200", 141, 4800, 989, 1979, 0.6, "NVIDIA, H200 datasheet", fp32=67),
    "m1": _apple("Apple M1, 16 GB", 16, 68.25, 2.6, "Apple, newsroom, November 2020"),
    "m1-max": _apple("Apple M1 Max, 64 GB", 64, 400, 10.4, "Apple, newsroom, October 2021"),
    "m1-ultra": _apple("Apple M1 Ultra, 128 GB", 128, 800, 21, "Apple, newsroom, March 2022"),
    "cpu-32": _cpu("32 cores of EPYC 9004, 128 GB", 32, 128, 460.8, "AMD, EPYC 9004 datasheet, and torch.mm on a core"),
}
