"""Stage 7: a merge."""

import subprocess
import time

from gpu_stages.stage import Stage


def run(stage: Stage) -> None:
    """The adapter merged into the demo: seconds, and how the receipt judges."""
    target = stage.folder / "merged"
    begun = time.perf_counter()
    words = ["export", "--lora_weights", stage.adapter(), "--output_dir", target]
    done = subprocess.run(stage.command(*words), capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()
    stage.tell(seconds_in_all=time.perf_counter() - begun, said=said[-1:])
    if done.returncode:
        raise RuntimeError(said[-1] if said else f"exit code {done.returncode}")
