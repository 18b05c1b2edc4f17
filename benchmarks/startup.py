"""How long until an answer? python benchmarks/startup.py [--runs N] [--adapter FOLDER]

Times whole processes: `generate --instruction` on the demo base alone and with an adapter (one that is trained for a
few steps first, unless one is named), and beside them the least that any program needs that loads a Llama with
transformers, `import torch; from transformers import LlamaForCausalLM`. They take turns, the caches of the disk are
warm, and the answer has one token. What counts is what comes on top of the imports, medians in seconds of the clock and
of the processor. Writes benchmarks/results/startup-DATE.json; its figures are the last line, one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results_file import write

IMPORTS = ["-c", "import torch; from transformers import LlamaForCausalLM"]
ANSWER = ["--base_model=demo", "--instruction=Tell me about alpacas.", "--max_new_tokens=1", "--device=cpu"]


def timed(words: list[str], folder: Path) -> tuple[float, float]:
    """Return the seconds that a Python process takes, on the clock and of the processor."""
    before, began = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
    spent = after.children_user - before.children_user + after.children_system - before.children_system
    return seconds, spent


def trained(folder: Path) -> Path:
    """Return the folder of an adapter for the demo base."""
    words = ["-m", "lora_alpaca", "finetune", "--max_steps=4", f"--output_dir={folder / 'adapter'}", "--device=cpu"]
    timed(words, folder)
    return folder / "adapter"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--adapter", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        adapter = asked.adapter.resolve() if asked.adapter else trained(Path(place))
        generate = ["-m", "lora_alpaca", "generate", *ANSWER]
        commands = {
            "imports": IMPORTS,
            "base": [*generate, "--lora_weights=none"],
            "adapter": [*generate, f"--lora_weights={adapter}"],
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for run in range(asked.runs + 1):
            for name, words in commands.items():
                taken = timed(words, Path(place))
                if run:  # the first fills caches
                    found[name].append(taken)
    clock = {name: statistics.median(seconds for seconds, _ in runs) for name, runs in found.items()}
    spent = {name: statistics.median(seconds for _, seconds in runs) for name, runs in found.items()}
    print(f"{'':10}{'seconds':>10}{'processor':>12}{'on top':>10}")
    for name in commands:
        print(f"{name:10}{clock[name]:10.2f}{spent[name]:12.2f}{clock[name] - clock['imports']:10.2f}")
    result = {
        **{f"{name}_seconds": round(value, 2) for name, value in clock.items()},
        **{f"{name}_processor_seconds": round(value, 2) for name, value in spent.items()},
        "base_on_top": round(clock["base"] - clock["imports"], 2),
        "adapter_on_top": round(clock["adapter"] - clock["imports"], 2),
        "runs": asked.runs,
    }
    write("startup", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
