"""What a machine computes with: on another one, or with other settings, the same numbers round otherwise."""

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

DRIVER = Path("/proc/driver/nvidia/version")
INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "neon", "bf16", "sve", "sve2")
VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH_", "PYTORCH_", "CUDA_", "CUBLAS_",
             "NVIDIA_", "BNB_")  # fmt: skip  # beginnings of those that change how libraries compute
CAPACITY = "_CACHE_CAPACITY"  # end of those by which kernels are only kept; a run sets one itself, when it has begun


def describe(device: torch.device) -> dict[str, Any]:
    """Return processor, instruction set, cores, threads and, of a GPU, its name, CUDA and driver; None where unknown.

    `instructions` are the widest that torch uses, and those of its matrix products that the processor has.
    """
    able = torch.cpu.get_capabilities()
    on_gpu = device.type == "cuda"
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": able.get("cpu_name") or platform.processor() or None,
        "instructions": [torch.backends.cpu.get_cpu_capability(), *(name for name in INSTRUCTIONS if able.get(name))],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _driver() if on_gpu else None,
    }


def in_detail(device: torch.device) -> dict[str, Any]:
    """Return what `describe` does and all else by which sums may round otherwise: every capability and property,
    how torch was built and is set, and the variables of libraries.
    """
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(VARIABLES)}
    return describe(device) | {
        "device": str(device),
        "python": platform.python_version(),
        "capabilities": dict(torch.cpu.get_capabilities()),
        "properties": str(torch.cuda.get_device_properties(device)) if device.type == "cuda" else None,
        "torch": torch.__config__.show(),
        "matmul": [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
        "variables": {name: value for name, value in variables.items() if not name.endswith(CAPACITY)},
    }


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, where its kernel module tells it."""
    with suppress(OSError, StopIteration):
        words = DRIVER.read_text(encoding="utf-8").splitlines()[0].split()
        return next(word for word in words if word[:1].isdigit())
    return None
