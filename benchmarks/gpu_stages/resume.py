"""Stage 5: kill and resume, to the bit."""

import hashlib
import signal
import subprocess
import time

from gpu_stages.stage import Stage


def run(stage: Stage) -> None:
    """A run that is killed after a checkpoint and resumed leaves the bytes of one that was not."""
    steps = 6 if stage.tiny else 30
    words = [
        "finetune", "--max_steps", steps, "--save_steps", 2, "--val_set_size", 0, "--batch_size", 16,
        "--micro_batch_size", 4, "--seed", 1, "--compile", "False",
    ]  # fmt: skip
    whole, killed = stage.folder / "whole", stage.folder / "killed"
    begun = time.perf_counter()
    subprocess.run(stage.command(*words, "--output_dir", whole), check=True, stdout=subprocess.DEVNULL)
    stage.tell(steps=steps, run_seconds=time.perf_counter() - begun)
    process = subprocess.Popen(stage.command(*words, "--output_dir", killed), stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob("checkpoint-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted(path.name for path in killed.glob("checkpoint-*"))
    stage.tell(killed_with=kept)
    subprocess.run(stage.command(*words, "--output_dir", killed, "--resume"), check=True, stdout=subprocess.DEVNULL)
    sums = [hashlib.sha256((one / "adapter_model.safetensors").read_bytes()).hexdigest() for one in (whole, killed)]
    stage.tell(same_bytes=sums[0] == sums[1])
    if sums[0] != sums[1]:
        raise RuntimeError("the resumed run left other bytes")
