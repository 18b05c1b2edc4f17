"""What do two threads cost beside another program? python benchmarks/contention.py [--rounds N] [--threads N]

Trains SmolLM2-135M, if `make real` has fetched it, else a random model of its shape (30 layers, 576 wide), forward and
backward in fp32: on one thread, and on several that wait awake, as GNU's OpenMP has them, asleep, or for a moment awake
and then asleep, as lora_alpaca has them. `chosen` is what a run of lora_alpaca that begins there trains with: the last
of these, or one thread, by its measurement. All take turns of a few seconds, with nothing beside them, a busy loop,
and with one that is pinned to a core. What counts is the rate over that of one thread, in the same round: the median of
rounds, which other work on the machine disturbs least. Writes benchmarks/results/contention-DATE.json; its figures are
the last line, one JSON object. The aim is 0.9 beside a busy loop.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from results_file import write

import lora_alpaca

REAL = Path.home() / ".cache" / "lora_alpaca_real" / "SmolLM2-135M-Instruct"
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = 64  # of a step
BUSY = [sys.executable, "-c", "while True: pass"]
ASLEEP = {"OMP_WAIT_POLICY": "passive"}
BRIEFLY = dict(lora_alpaca.WAITING)
WAITING = {"awake": {}, "asleep": ASLEEP, "briefly awake": BRIEFLY, "chosen": BRIEFLY}


def train() -> None:
    """Answer each line `THREADS SECONDS` on standard input with the tokens per second of so long a turn, and `THREADS`
    with the number, that or one, that a run uses which begins now.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from lora_alpaca.training.threads import faster

    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32, local_files_only=True)
        if REAL.is_dir()
        else LlamaForCausalLM(LlamaConfig(**SHAPE))
    )
    ids = torch.randint(0, 40_000, (1, TOKENS))

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        model.zero_grad()

    for line in sys.stdin:
        threads, *seconds = map(float, line.split())
        torch.set_num_threads(int(threads))
        if not seconds:
            print(faster(step, int(threads))[0], flush=True)
            continue
        steps, begun = 0, time.perf_counter()
        while (taken := time.perf_counter() - begun) < seconds[0] or not steps:
            step()
            steps += 1
        print(steps * TOKENS / taken, flush=True)


def started(variables: dict[str, str]) -> subprocess.Popen[str]:
    """Return a process that trains in turns, with these variables and none other of OpenMP."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    words, pipe = [sys.executable, __file__, "--turns"], subprocess.PIPE
    return subprocess.Popen(words, env=own | variables, stdin=pipe, stdout=pipe, text=True)


def ask(process: subprocess.Popen[str], *numbers: float) -> float:
    """Return what a process answers: the tokens per second of a turn, or a number of threads."""
    assert process.stdin and process.stdout
    process.stdin.write(" ".join(map(str, numbers)) + "\n")
    process.stdin.flush()
    if not (said := process.stdout.readline()):
        raise SystemExit("a process that trains has ended")
    return float(said)


@contextmanager
def beside(what: str) -> Iterator[None]:
    """Let another program run: none, a busy loop, or one that stays on the first core."""
    if what == "nothing":
        yield
        return
    core = min(os.sched_getaffinity(0))
    process = subprocess.Popen(BUSY, preexec_fn=lambda: os.sched_setaffinity(0, {core}) if what == "pinned" else None)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.turns:
        return train()
    result: dict[str, object] = {
        "rounds": asked.rounds,
        "threads": asked.threads,
        "model": REAL.name if REAL.is_dir() else "random",
    }
    print(f"{'beside':10}{'one thread':>12}" + "".join(f"{name:>22}" for name in WAITING))
    with ExitStack() as running:
        processes = {name: started(variables) for name, variables in WAITING.items()}
        for process in processes.values():
            running.callback(process.wait)
            running.callback(process.kill)
            ask(process, asked.threads, 0)  # whatever the first step makes is there then
        for what in ("nothing", "loop", "pinned"):
            rates: dict[str, list[float]] = {name: [] for name in ("one", *WAITING)}
            with beside(what):
                chosen = int(ask(processes["chosen"], asked.threads))
                for _ in range(asked.rounds):
                    rates["one"].append(ask(processes["asleep"], 1, asked.seconds))
                    for name, process in processes.items():
                        threads = chosen if name == "chosen" else asked.threads
                        rates[name].append(ask(process, threads, asked.seconds))
            median = {name: statistics.median(found) for name, found in rates.items()}
            ratio = {
                name: statistics.median(many / one for many, one in zip(rates[name], rates["one"], strict=True))
                for name in WAITING
            }
            print(
                f"{what:10}{median['one']:12.0f}"
                + "".join(f"{f'{median[name]:.0f} ({ratio[name]:.2f})':>22}" for name in WAITING),
                flush=True,
            )
            result[f"{what} threads chosen"] = chosen
            result |= {f"{what} {name}": round(rate, 1) for name, rate in median.items()}
            result |= {f"{what} {name} over one": round(value, 2) for name, value in ratio.items()}
    write("contention", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
