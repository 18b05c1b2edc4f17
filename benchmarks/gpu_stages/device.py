"""Stage 1: the card, what is installed for it, and what it can do."""

import contextlib
import importlib
import sys

from gpu_stages.stage import Stage

LIBRARIES = (
    "torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "datasets",
    "pydantic", "fire", "numpy", "trl",
)  # fmt: skip
NOT_NEEDED = {"triton", "trl"}


def run(stage: Stage) -> None:
    """Versions and what does not import; the card; products, and copies to the card."""
    versions, missing = {}, {}
    for name in LIBRARIES:
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "?")
        except Exception as error:  # a broken library raises anything
            missing[name] = f"{type(error).__name__}: {error}"[:200]
    stage.tell(python=sys.version.split()[0], versions=versions, missing=missing)
    if wanted := set(missing) - NOT_NEEDED:
        raise ImportError(f"these do not import: {', '.join(f'{name} ({missing[name]})' for name in sorted(wanted))}")
    import torch

    from lora_alpaca.models import cards
    from lora_alpaca.models.device import has_bf16

    where = torch.device(stage.device)
    if stage.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        stage.tell(
            card=torch.cuda.get_device_name(), capability=capability, kernels=torch.cuda.get_arch_list(),
            free_gb=round(free / 1e9, 1), total_gb=round(total / 1e9, 1), driver=cards.driver_version(),
        )  # fmt: skip
        cards.require_able(where)
    else:
        stage.tell(unused_card=cards.unused())
    stage.tell(native_bf16=has_bf16(where))
    size, teraflops = 256 if stage.tiny else 8192, {}
    for name in ("bfloat16", "float16", "float32", "tf32", "int8"):
        with contextlib.suppress(Exception), cards.fp32_products(name == "tf32"):
            kind = getattr(torch, "float32" if name == "tf32" else name)
            one, other = (torch.ones(size, size, dtype=kind, device=where) for _ in range(2))
            multiply = (lambda: torch._int_mm(one, other.t())) if name == "int8" else (lambda: one @ other.t())  # noqa: B023
            teraflops[name] = round(2 * size**3 / stage.median(multiply) / 1e12, 3)
    stage.tell(tera_operations=teraflops)
    copied = torch.zeros(2**20 if stage.tiny else 2**28, dtype=torch.uint8)
    copied = copied.pin_memory() if stage.device == "cuda" else copied
    seconds = stage.median(lambda: copied.to(where, non_blocking=True, copy=True))
    stage.tell(copy_gb_per_second=round(copied.numel() / seconds / 1e9, 2))
