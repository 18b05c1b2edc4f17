"""Stage 3: a step at 1B, of ours and of what else there is."""

import importlib.util

from gpu_stages.stage import Stage
from gpu_stages.steps import measure


def run(stage: Stage) -> None:
    """Seconds, tokens a second and the most memory of one step: ours, and what else there is, in 8 bits and 16."""
    ways = {"ours, 8-bit": ("", 8), "alpaca-lora recipe, 8-bit": ("alpaca-lora", 8), "ours, 4-bit": ("", 4)}
    ways |= {"ours, 16 bits": ("", 16), "Trainer, 16 bits": ("Trainer", 16)}
    if importlib.util.find_spec("trl"):
        ways["TRL packing, 16 bits"] = ("TRL", 16)
    measure(stage, "1b", ways)
