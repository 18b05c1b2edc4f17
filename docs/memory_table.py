"""Write the tables of memory in docs/distributed.md: python docs/memory_table.py"""

import re
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.meta import meta_model
from lora_alpaca.planning import estimate
from lora_alpaca.planning.estimate import Layout, Memory, ModelSize
from lora_alpaca.planning.size import model_size

PAGE = Path(__file__).parent / "distributed.md"
MARK = re.compile(r"(<!-- memory -->\n).*?(<!-- end memory -->)", re.DOTALL)
TOKENS = 2048
SHAPES = {  # of Llama 2, as published
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8},
}
TRAININGS = {
    "LoRA, 16 bits": ("lora", 16),
    "LoRA, 8 bits": ("lora", 8),
    "LoRA, 4 bits": ("lora", 4),
    "full": ("full", 16),
}
DEVICES = (1, 4, 8)
LAYOUTS = {
    "none": [Layout()],
    **{f"full, {devices}": [Layout(devices, devices, "full", devices)] for devices in DEVICES[1:]},
    "full, offload": [Layout(devices, devices, "full", devices, offloads=True) for devices in DEVICES],
}
PARTS = ("weights", "trained", "gradients", "optimizer", "gathered", "activations", "logits")


def sizes(shape: dict[str, int]) -> dict[str, ModelSize]:
    """Return the sizes of a base of this shape in every training."""
    base = Base("a Llama", "", None, False, transformers.LlamaConfig(vocab_size=32000, **shape))
    spec = DeviceSpec(torch.device("cuda"), torch.bfloat16, 16)
    of = {tune: model_size(FinetuneConfig(tune=tune), base, spec, meta_model(base)) for tune in ("lora", "full")}
    return {name: replace(of[tune], spec=replace(spec, bits=bits)) for name, (tune, bits) in TRAININGS.items()}


def table(name: str) -> str:
    """Return the table of one shape: gigabytes of one device by part, and of the host for each of DEVICES."""
    lines = [_line(f"{name}, trained", "shard", *PARTS, "**a device**", "host"), "|---|---|" + "--:|" * 9]
    for training, size in sizes(SHAPES[name]).items():
        for spread, layouts in LAYOUTS.items():
            found = [estimate.memory(size, layout, TOKENS, recomputes=True) for layout in layouts]
            lines.append(_line(training, spread, *_cells(found)))
    return "\n".join(lines)


def _cells(found: list[Memory]) -> list[str]:
    parts = found[0].device  # alike for all of them: they differ in the host's share
    device = [f"{getattr(parts, part) / 1e9:.1f}" for part in PARTS]
    host = " / ".join(f"{memory.host.total / 1e9:.1f}" for memory in found if memory.host.total)
    return [*device, f"**{parts.total / 1e9:.1f}**", host]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def section() -> str:
    """Return what stands between the marks."""
    return "\n\n".join(map(table, SHAPES))


def main() -> None:
    """Put the tables between their marks."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARK.sub(lambda found: f"{found[1]}{section()}\n{found[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
