"""How long until the first step, and until an answer? python benchmarks/startup.py [--runs N] [--old COMMIT]

Times whole processes from the command on, and what each part of a start takes, by the lines that a run prints:
`finetune` on the demo (imports; rows, with tokenizer and the base's hash; load and check; validation before the first
step; first step; exit), the same with --compile True, and `generate --instruction` of one token on the demo base and
with an adapter. Beside them is the least that any program needs that loads a Llama with transformers, `import torch;
from transformers import LlamaForCausalLM`. With --old the same is done by an earlier commit, in turns. The first run of
each fills the caches, and does not count. Medians in seconds of the processor, which other programs disturb least, and
of the clock. Writes benchmarks/results/startup-DATE.json; its figures are the last line, one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from results_file import write

ROOT = Path(__file__).parents[1]
IMPORTS = ["-c", "import torch; from transformers import LlamaForCausalLM"]
ANSWER = ["generate", "--base_model=demo", "--instruction=Tell me about alpacas.", "--max_new_tokens=1", "--device=cpu"]
TRAIN = ["finetune", "--max_steps=1", "--logging_steps=1", "--device=cpu"]
PARTS = {  # what ends with the first line that begins so
    "import": "",
    "rows and hash": "memory of each device",
    "load and check": "engine: ",
    "validation": "validation loss",
    "first step": "step 1/1",
}
TICKS = os.sysconf("SC_CLK_TCK")
Times = tuple[float, float]  # seconds of the clock and of the processor


def spent(process: int) -> float:
    """Return the seconds of processor time that a process has taken so far, all its threads together."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def timed(words: list[str], tree: Path, folder: Path, parts: dict[str, str]) -> dict[str, Times]:
    """Return the times of a Python process that runs with a tree of sources: those of its parts, `exit` and `all`."""
    environment = os.environ | {
        "PYTHONPATH": str(tree), "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(folder / f"cache-{tree.name}"),
    }  # fmt: skip
    before, began = os.times(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    waiting, found, last, said = dict(parts), {}, (0.0, 0.0), []
    for line in process.stdout or ():
        said.append(line)
        now = time.perf_counter() - began, spent(process.pid)
        for name in [name for name, beginning in waiting.items() if line.startswith(beginning)][:1]:
            found[name] = now[0] - last[0], now[1] - last[1]
            last = now
            del waiting[name]
        quiet = now
    if process.wait() or waiting:
        raise SystemExit(
            f"{' '.join(words)}: exit code {process.returncode}, no line for {[*waiting]}\n{''.join(said)}"
        )
    after = os.times()
    taken = after.children_user - before.children_user + after.children_system - before.children_system
    whole = time.perf_counter() - began, taken
    if parts:
        found["first step done"] = last
        found["exit"] = whole[0] - quiet[0], whole[1] - quiet[1]
    return found | {"all": whole}


@contextmanager
def trees(old: str | None) -> Iterator[dict[str, Path]]:
    """Give the trees that are compared: this one, and a temporary one of an earlier commit."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as added:
        found = {"new": ROOT}
        if old:
            found = {"old": Path(place) / "old", **found}
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "--quiet", "--detach", str(found["old"]), old], check=True)
            added.callback(subprocess.run, [*git, "remove", "--force", str(found["old"])], check=True)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--old", metavar="COMMIT", help="an earlier commit, which is timed in turns with this tree")
    asked = parser.parse_args()
    found: dict[str, dict[str, list[Times]]] = {}
    with tempfile.TemporaryDirectory() as place, trees(asked.old) as compared:
        folder, ours = Path(place), ["-m", "lora_alpaca"]
        for run in range(asked.runs + 1):
            for which, tree in compared.items():
                out = folder / f"{which}-{run}"
                adapter = folder / f"{which}-0"
                commands = {
                    "finetune": ([*ours, *TRAIN, f"--output_dir={out}"], PARTS),
                    "compiled": ([*ours, *TRAIN, f"--output_dir={out}-compiled", "--compile=True"], PARTS),
                    "base": ([*ours, *ANSWER, "--lora_weights=none"], {}),
                    "adapter": ([*ours, *ANSWER, f"--lora_weights={adapter}"], {}),
                    "imports": (IMPORTS, {}),
                }
                for name, (words, parts) in commands.items():
                    for part, times in timed(words, tree, folder, parts).items():
                        if run:
                            found.setdefault(f"{name}: {part}", {}).setdefault(which, []).append(times)
    result: dict[str, object] = {"runs": asked.runs, "old": asked.old}
    print(f"{'seconds of the processor (clock)':34}" + "".join(f"{which:>18}" for which in compared))
    for name, by_tree in found.items():
        medians = {
            which: [round(statistics.median(column), 2) for column in zip(*runs, strict=True)]
            for which, runs in by_tree.items()
        }
        shown = "".join(f"{f'{processor:.2f} ({clock:.2f})':>18}" for clock, processor in medians.values())
        ratio = medians["new"][1] / medians["old"][1] if "old" in medians and medians["old"][1] else 0
        print(f"{name:34}{shown}" + (f"{ratio:8.2f}" if ratio else ""))
        result |= {
            f"{name} {which}": {"seconds": clock, "processor_seconds": processor}
            for which, (clock, processor) in medians.items()
        }
    write("startup", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
