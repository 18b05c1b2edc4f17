"""Memory of real runs against the formulas of planning/estimate.py: python benchmarks/memory.py

A random Llama of 66 million parameters trains for two steps in fp32 on CPUs, on one process and on two (gloo). Peak
anonymous memory, above what the process had after its imports, is sampled every few milliseconds, and compared with
the sum of the parts that `planning` counts. Weights that are views of their file are not anonymous. Writes
benchmarks/results/memory-DATE.json; the last line is JSON.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8}
TOKENS = 512  # of a pack
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # processes, and options beside the common ones
    "LoRA, 16 bits": (1, {"load_8bit": False}),
    "LoRA, 8 bits": (1, {"load_8bit": True}),
    "LoRA, 4 bits": (1, {"load_4bit": True}),
    "LoRA, recomputed": (1, {"load_8bit": False, "gradient_checkpointing": True}),
    "full": (1, {"tune": "full"}),
    "full, recomputed": (1, {"tune": "full", "gradient_checkpointing": True}),
    "full, top:2": (1, {"tune": "full", "layers": "top:2"}),
    "LoRA, 16 bits, shard full": (2, {"load_8bit": False, "shard": "full"}),
    "LoRA, 16 bits, shard grads": (2, {"load_8bit": False, "shard": "grads"}),
    "LoRA, 8 bits, shard full": (2, {"load_8bit": True, "shard": "full"}),
    "LoRA, 4 bits, shard full": (2, {"load_4bit": True, "shard": "full"}),
    "full, shard full": (2, {"tune": "full", "shard": "full"}),
}


def make_base(folder: Path) -> None:
    """Save a random Llama with the tokenizer of the demo base, and rows that fill packs."""
    import torch
    import transformers

    from lora_alpaca.models.base import demo_base

    shutil.copytree(demo_base(), folder / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    old = transformers.AutoConfig.from_pretrained(demo_base())
    ids = {name: getattr(old, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=8000, **SHAPE, **ids)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base", max_shard_size="100MB")
    draw = random.Random(0)
    words = ["hot", "cold", "early", "late", "the", "opposite", "of", "a", "word", "is", "name"]
    rows = [
        {"instruction": " ".join(draw.choices(words, k=30)), "input": "", "output": " ".join(draw.choices(words, k=60))}
        for _ in range(64)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))


def anonymous() -> int:
    """Return the anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("RssAnon is not told here")


def child(folder: Path, options: dict[str, Any]) -> None:
    """Train in this process, and write its peak and what was estimated for it."""
    import bitsandbytes  # noqa: F401  whose import is not the run's memory
    import torch.distributed.fsdp  # noqa: F401

    from lora_alpaca import FinetuneConfig
    from lora_alpaca.planning import plan as plans
    from lora_alpaca.planning import preflight
    from lora_alpaca.planning.estimate import Estimate
    from lora_alpaca.training import finetuning

    estimates: list[tuple[Any, ...]] = []

    def estimate_run(*args: Any) -> Estimate:
        estimates.append((plans.estimate_run(*args), *args))
        return estimates[-1][0]

    preflight.estimate_run = estimate_run  # type: ignore[attr-defined,assignment]
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], anonymous())

    sampler = threading.Thread(target=watch, daemon=True)
    sampler.start()
    finetuning.train(FinetuneConfig(**options))
    done.set()
    sampler.join()
    found, plan, _, _, size, _ = estimates[0]
    parts = found.memory.device
    on_file = parts.weights if size.is_mapped and plan.shard == "none" else 0
    rank = os.environ.get("RANK", "0")
    figures = {
        "measured": peak[0] - before,
        "estimated": parts.total - on_file,
        "parts": vars(parts),
        "mapped": on_file,
        "plan": str(plan),
    }
    (folder / f"figures-{rank}.json").write_text(json.dumps(figures))


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Run one case, and return the figures of the rank that took the most."""
    ranks, options = CASES[name]
    common = {
        "base_model": str(folder / "base"), "data_path": str(folder / "rows.json"), "cutoff_len": 512, "dtype": "fp32",
        "output_dir": str(folder / "out"), "overwrite": True, "val_set_size": 0, "max_steps": 2, "batch_size": 8,
        "token_budget": TOKENS, "learning_rate": 1e-5, "compile": False, "device": "cpu", "cache_dir": "none",
    }  # fmt: skip
    if "gradient_checkpointing" not in options:
        common["gradient_checkpointing"] = False
    for old in folder.glob("figures-*.json"):
        old.unlink()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *launcher, __file__, str(folder), json.dumps(common | options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("figures-*.json"))]
    if done.returncode or len(found) != ranks:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        return {"failed": (last or ["no output"])[0][:300]}
    most = max(found, key=lambda one: one["measured"])
    return {**most, "ratio": round(most["estimated"] / most["measured"], 3)}


def main() -> None:
    """Measure every case, or those whose names are given."""
    if len(sys.argv) == 3 and sys.argv[2].startswith("{"):
        child(Path(sys.argv[1]), json.loads(sys.argv[2]))
        return
    from results_file import write

    names = sys.argv[1:] or list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder))
        cases = {}
        for name in names:
            cases[name] = found = measure(Path(folder), name)
            said = found.get("failed") or (
                f"{found['measured'] / 1e6:.0f} MB measured, {found['estimated'] / 1e6:.0f} estimated, "
                f"{found['ratio']:.2f}"
            )
            print(f"{name}: {said}", flush=True)
    ratios = [found["ratio"] for found in cases.values() if "ratio" in found]
    if names == list(CASES):
        write("memory", {"shape": SHAPE, "tokens": TOKENS, "cases": cases})
    print(json.dumps({"least_ratio": min(ratios), "largest_ratio": max(ratios), "cases": len(ratios)}))


if __name__ == "__main__":
    main()
