"""What does sharding save, and what does it cost? python benchmarks/sharding.py [--quick]

A random Llama of 1.3 GB in fp32, stored in bf16, is loaded on two ranks of this machine (gloo, one thread each), its
packs are compared with rows alone, and a LoRA adapter learns for a few steps: whole on every rank (`none`), sharded
(`full`), sharded with the shards in host memory (`offload`), and sharded but gathered from forward to backward
(`grads`). Memory is anonymous memory of the rank that takes the most, above what it takes after its imports, sampled
every 5 ms: at the load, at the check, and in the steps. Weights that are views of a file do not count. On a CPU
`offload` is where the shards are anyway. Writes benchmarks/results/sharding-DATE.json; the last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from results_file import write

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
LAYERS, VOCABULARY, STEPS, ROWS = 44, 8000, 3, 4
MODES = ("none", "full", "offload", "grads")
TARGETS = {"peak_ratio": 0.7}


class Peak(threading.Thread):
    """Samples the anonymous memory of this process; `most` is the largest since `start_over`, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.005)

    def start_over(self) -> int:
        """Return the most so far, and begin anew."""
        most, self.most = max(self.most, anonymous()), 0
        return most


def anonymous() -> int:
    """Return the anonymous memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def save_base(folder: Path, layers: int) -> None:
    """Save a random Llama in bf16."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=512, **SIZES
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")


def rank(mode: str, folder: Path) -> None:
    """Load and train as one rank; the main rank writes the figures of the worst rank."""
    import torch

    from lora_alpaca.config import FinetuneConfig
    from lora_alpaca.data.examples import Example
    from lora_alpaca.distributed.fsdp import Sharded
    from lora_alpaca.distributed.strategy import Replicated
    from lora_alpaca.distributed.world import World
    from lora_alpaca.engine import EngineChoices, fitted
    from lora_alpaca.models import lora
    from lora_alpaca.models.base import locate_base
    from lora_alpaca.training.step import Stepper

    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCABULARY, (40,), generator=draw).tolist() for _ in range(ROWS)]
    rows = [Example(np.array(row), [(20, 40)]) for row in ids]
    config = FinetuneConfig(device="cpu", dtype="fp32", load_8bit=False, lora_target_modules=["q_proj", "v_proj"])
    with World(config) as world:
        base, peak = locate_base(str(folder / "base")), Peak()
        before = anonymous()
        peak.start()
        sharded = Sharded(world, mode == "grads", None, mode == "offload", False)
        strategy = Replicated(world) if mode == "none" else sharded
        torch.manual_seed(0)
        begun = time.perf_counter()
        model, _ = strategy.load(base, world.spec, lambda model: lora.attach(model, config, base))
        seconds = {"load": time.perf_counter() - begun}
        most = {"load": peak.start_over()}
        choices = EngineChoices(engine="packed", token_budget=80, micro_batch_size=2)
        with fitted(model, choices, world.spec, 0, rows, world.autocast, False, strategy) as (engine, _):
            most["check"] = peak.start_over()
            stepper = Stepper(engine, lora.LoraAdapter(model), strategy, world, config, print)
            taken = []
            for _ in range(STEPS):
                begun = time.perf_counter()
                stepper.step(rows, 1e-4)
                taken.append(time.perf_counter() - begun)
            most["steps"] = peak.start_over()
        seconds["step"] = statistics.median(taken[1:])
        if mode == "full":
            most["save_extra"] = before + save(model, world, folder, peak)
        megabytes = {f"{name}_mb": round(world.largest(value - before) / 1e6) for name, value in most.items()}
        found = megabytes | {f"{name}_seconds": round(value, 2) for name, value in seconds.items()}
        if world.is_main:
            (folder / f"{mode}.json").write_text(json.dumps(found))


def save(model: Any, world: Any, folder: Path, peak: Peak) -> int:
    """Write the whole model as its final save does, and return what that takes beyond what the rank holds, in bytes."""
    from lora_alpaca.distributed import sharded_state
    from lora_alpaca.models.shards import ShardWriter
    from lora_alpaca.models.weights import TensorInfo

    tensors = {name: one.detach() for name, one in model.named_parameters() if "lora_" not in name}
    infos = {name: TensorInfo(one.dtype, tuple(one.shape)) for name, one in tensors.items()}

    def write_all(whole: Any) -> None:
        (folder / "saved").mkdir()
        writer = ShardWriter(folder / "saved", infos, 5 * 10**9)
        for name, tensor in whole:
            writer.write(name, tensor)
        writer.finish()

    peak.start_over()
    held = anonymous()
    sharded_state.gather(tensors, world, write_all)
    return peak.start_over() - held


def main() -> None:
    """Measure every mode in processes of its own, and end with the figures in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the model, and nothing is written")
    parser.add_argument("--rank", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        return rank(asked.rank, asked.folder)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        save_base(Path(place) / "base", LAYERS // 10 if asked.quick else LAYERS)
        for mode in MODES:
            words = [*launch, "--rank", mode, "--folder", place]
            subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            figures[mode] = json.loads((Path(place) / f"{mode}.json").read_text())
            figures[mode]["peak_mb"] = max(figures[mode][f"{part}_mb"] for part in ("load", "check", "steps"))
            print(f"{mode:8}", figures[mode])
    whole, sharded = figures["none"], figures["full"]
    ratios = {
        "peak_ratio": round(sharded["peak_mb"] / whole["peak_mb"], 3),
        "load_ratio": round(sharded["load_mb"] / whole["load_mb"], 3),
        "offload_ratio": round(figures["offload"]["peak_mb"] / whole["peak_mb"], 3),
        "save_extra_mb": sharded["save_extra_mb"],
        "step_ratio": round(sharded["step_seconds"] / whole["step_seconds"], 2),
    }
    for name, target in TARGETS.items():
        print(f"{name:16} {ratios[name]:8} (target: at most {target})")
    if not asked.quick:
        print(write("sharding", {"ranks": 2, "layers": LAYERS, **ratios, "modes": figures}).name)
    print(json.dumps(ratios))
    return None


if __name__ == "__main__":
    main()
