"""Does the demo end the same in every precision and on two ranks? python benchmarks/demo_agreement.py [SEED ...]

Trains the demo in 8-bit, bf16, fp32 and 4-bit, and in 8-bit under torchrun with two processes, with three seeds each
or those that are named, and scores every adapter, on the base in the precision it was trained on, by exact match on
the development split. Writes benchmarks/results/demo_agreement-DATE.json and ends with its medians as one JSON line.
A quarter of an hour on 2 cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results_file import write

from lora_alpaca import GenerateConfig, Generator
from lora_alpaca.artifacts import run_record
from lora_alpaca.data import Rows, demo_file
from lora_alpaca.demo.__main__ import exact_match
from lora_alpaca.planning.budget import minutes

ROOT = Path(__file__).parent.parent
SEEDS = (42, 1, 2)
PYTHON, TORCHRUN = (
    [sys.executable],
    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
)
SETTINGS = {  # name: launcher, flags of training and generation
    "8-bit": (PYTHON, ["--load_8bit", "True"]),
    "bf16": (PYTHON, ["--load_8bit", "False", "--dtype", "bf16"]),
    "fp32": (PYTHON, ["--load_8bit", "False", "--dtype", "fp32"]),
    "8-bit, 2 ranks": (TORCHRUN, ["--load_8bit", "True"]),
    "4-bit": (PYTHON, ["--load_4bit", "True"]),
}


def measure(name: str, seed: int, folder: Path) -> dict[str, object]:
    """Return score, losses and seconds of one run."""
    launcher, flags = SETTINGS[name]
    output_dir = folder / f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
    command = [*launcher, str(ROOT / "finetune.py"), *flags, "--seed", str(seed), "--output_dir", str(output_dir)]
    # two processes of one thread each, or one of two: the same cores for all
    threads = {"OMP_NUM_THREADS": "1" if launcher is TORCHRUN else "2"}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | threads)
    run = run_record.finished_run(output_dir)
    options = {word.removeprefix("--"): value for word, value in zip(flags[::2], flags[1::2], strict=True)}
    generator = Generator.load(
        GenerateConfig(lora_weights=str(output_dir), temperature=0, max_new_tokens=80, **options)  # type: ignore[arg-type]
    )
    score = exact_match(generator, list(Rows(str(demo_file("development")))))
    return {
        "setting": name,
        "seed": seed,
        "exact_match": score,
        "validation_loss": run.validation_loss,
        "training_seconds": round(run.seconds, 1),
    }


def main() -> None:
    """Run every setting with every seed, in turn, and write what came of it."""
    begun, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, sys.argv[1:]) if sys.argv[1:] else SEEDS:
            for name in SETTINGS:
                rows.append(measure(name, seed, Path(folder)))
                print(rows[-1], flush=True)
    medians = {
        name: statistics.median(float(str(row["exact_match"])) for row in rows if row["setting"] == name)
        for name in SETTINGS
    }
    path = write("demo_agreement", {"medians": medians, "runs": rows})
    print(f"{path.relative_to(ROOT)} written in {minutes(time.perf_counter() - begun)}")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
