"""Stage 4: a step at 7B."""

from gpu_stages.stage import Stage
from gpu_stages.steps import measure


def run(stage: Stage) -> None:
    """Seconds, tokens a second and the most memory of one step of ours, beside the estimate of memory."""
    measure(stage, "7b", {"ours, 8-bit": ("", 8), "ours, 4-bit": ("", 4)})
