"""Estimates against real runs: python benchmarks/estimate.py [--only "NAME;NAME"]

Every setting is estimated by what `lora-alpaca estimate` calls, with its probe, and then run on CPUs, in processes of
their own. Memory is the most that a process held: anonymous memory, sampled every few milliseconds, and weights that
are views of their file. Time is processor time of one thread, from the imports to the saved result, since other work
may run beside. Writes benchmarks/results/estimate-DATE.json after each setting; the last line is JSON.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "300M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16}
    | {"vocab_size": 32000},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "vocab_size": 32000},
}
REAL = Path(os.environ.get("LORA_ALPACA_REAL") or Path.home() / ".cache/lora_alpaca_real/SmolLM2-135M-Instruct")
BF16, EIGHT, FOUR = {"load_8bit": False}, {"load_8bit": True}, {"load_4bit": True}
FP32 = {"load_8bit": False, "dtype": "fp32"}
PADDED = {"engine": "padded", "micro_batch_size": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # base, and options beside the common ones
    "demo, LoRA": ("demo", {"max_steps": 20, "batch_size": 16}),
    "demo, full": ("demo", {"max_steps": 20, "batch_size": 16, "tune": "full"}),
    "demo, two ranks": ("demo", {"max_steps": 20, "batch_size": 16, "ranks": 2}),
    "SmolLM2-135M, bf16": ("135M", BF16),
    "SmolLM2-135M, 8 bits": ("135M", EIGHT),
    "SmolLM2-135M, padded": ("135M", BF16 | PADDED),
    "SmolLM2-135M, accumulated": ("135M", BF16 | {"batch_size": 24}),
    "SmolLM2-135M, recomputed": ("135M", BF16 | {"gradient_checkpointing": True, "token_budget": 1024}),
    "SmolLM2-135M, two ranks": ("135M", BF16 | {"ranks": 2, "batch_size": 16}),
    "SmolLM2-135M, full": ("135M", BF16 | {"tune": "full"}),
    "300M, bf16": ("300M", BF16),
    "300M, 8 bits": ("300M", EIGHT),
    "300M, 4 bits": ("300M", FOUR),
    "300M, fp32": ("300M", FP32),
    "300M, cutoff 128": ("300M", BF16 | {"cutoff_len": 128}),
    "300M, packs of 1024": ("300M", BF16 | {"token_budget": 1024}),
    "300M, full": ("300M", BF16 | {"tune": "full"}),
    "1.1B, bf16": ("1.1B", BF16 | {"batch_size": 4}),
    "1.1B, 8 bits": ("1.1B", EIGHT | {"batch_size": 4}),
}


def make_base(folder: Path, shape: str) -> Path:
    """Return the folder of a random Llama with the tokenizer of the demo base, in bf16."""
    if not (target := folder / shape).exists():
        import transformers

        from lora_alpaca.models import random_base
        from lora_alpaca.models.base import Base, demo_base

        shutil.copytree(demo_base(), target, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        old = transformers.AutoConfig.from_pretrained(demo_base())
        ids = {name: getattr(old, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = transformers.LlamaConfig(**SHAPES[shape], **ids, dtype="bfloat16")
        random_base.write(Base(shape, shape, None, False, config), target, SHAPES[shape]["num_hidden_layers"])
    return target


def make_rows(folder: Path) -> Path:
    """Return the file of 400 rows of very different lengths."""
    draw = random.Random(0)
    words = ["hot", "cold", "early", "late", "the", "opposite", "of", "a", "word", "is", "name"]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, most)))

    rows = [{"instruction": text(40), "input": "", "output": text(90)} for _ in range(400)]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def child(kind: str, options: dict[str, Any], ranks: int, figures: Path) -> None:
    """Estimate in this process, or train in it, and write what came of it."""
    import torch

    from lora_alpaca.training.estimating.peak import Peak

    if kind == "estimated":
        from lora_alpaca.config import EstimateConfig
        from lora_alpaca.training.estimating.estimating import forecast

        found = forecast(EstimateConfig(**options, devices=ranks), clock="process_time").to_json()
        figures.write_text(json.dumps(found))
        return
    from lora_alpaca.config import FinetuneConfig
    from lora_alpaca.training import finetuning

    with Peak(torch.device("cpu"), in_use=False) as peak:
        finetuning.train(FinetuneConfig(**options))
    figures.with_suffix(f".{os.environ.get('RANK', '0')}").write_text(
        json.dumps({"memory": peak.bytes, "seconds": time.process_time() - peak.seconds})
    )


def start(kind: str, options: dict[str, Any], ranks: int, figures: Path) -> None:
    """Run a child to its end. Raises RuntimeError with its last line where it fails."""
    several = kind == "measured" and ranks > 1
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if several else []
    words = [sys.executable, *launcher, __file__, "--child", kind, json.dumps(options), str(ranks), str(figures)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1][:300])


def measure(folder: Path, name: str) -> dict[str, Any]:
    """Return the figures of a setting."""
    shape, chosen = CASES[name]
    base = {"demo": "demo", "135M": str(REAL)}.get(shape) or str(make_base(folder, shape))
    ranks = chosen.get("ranks", 1)
    options = {
        "base_model": base, "data_path": str(folder / "rows.json"), "output_dir": str(folder / "out"), "batch_size": 8,
        "overwrite": True, "val_set_size": 8, "max_steps": 3, "eval_steps": 100, "token_budget": 512, "cutoff_len": 256,
        "device": "cpu", "cache_dir": "none", "compile": False, "prompt_template_name": "alpaca",
    } | {key: value for key, value in chosen.items() if key != "ranks"}  # fmt: skip
    figures = folder / "figures"
    try:
        start("estimated", options, ranks, figures)
        start("measured", options, ranks, figures)
    except RuntimeError as error:
        return {"failed": str(error)}
    estimated = json.loads(figures.read_text())
    found = [json.loads(figures.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]
    parts = estimated["memory"]
    mapped = parts["weights"] if parts["mapped"] else 0
    peak, seconds = max(one["memory"] for one in found) + mapped, max(one["seconds"] for one in found)
    return {
        "memory": {"estimated": parts["peak"], "measured": peak, "ratio": round(parts["peak"] / peak, 3)},
        "seconds": {
            "estimated": round(estimated["seconds"]["total"], 1),
            "measured": round(seconds, 1),
            "ratio": round(estimated["seconds"]["total"] / seconds, 3),
        },
        "parts": parts,
        "time_by_part": estimated["seconds"],
        "plan": estimated["plan"],
    }


def known() -> dict[str, Any]:
    """Return the settings that were measured last."""
    found = sorted((Path(__file__).parent / "results").glob("estimate-*.json"))
    return dict(json.loads(found[-1].read_text())["cases"]) if found else {}


def main() -> None:
    """Measure every setting, or those that are named."""
    if sys.argv[1:2] == ["--child"]:
        kind, options, ranks, figures = sys.argv[2:]
        child(kind, json.loads(options), int(ranks), Path(figures))
        return
    from results_file import write

    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--only", default="", help="settings by name, with semicolons between; others stay as measured")
    reader.add_argument("--folder", help="where to work, and to leave the bases; else a temporary folder")
    asked = reader.parse_args()
    names = [name for name in CASES if name in asked.only.split(";")] if asked.only else list(CASES)
    if not (REAL / "config.json").is_file():
        names = [name for name in names if CASES[name][0] != "135M"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(asked.folder or temporary)
        make_rows(folder)
        cases = known() if asked.only else {}
        for name in names:
            cases[name] = found = measure(folder, name)
            said = found.get("failed") or "; ".join(
                f"{kind} {found[kind]['estimated']:,} estimated, {found[kind]['measured']:,} measured, "
                f"{found[kind]['ratio']:.2f}"
                for kind in ("memory", "seconds")
            )
            print(f"{name}: {said}", flush=True)
            write("estimate", {"cases": {name: cases[name] for name in CASES if name in cases}})
    whole = [found for found in cases.values() if "memory" in found]
    last: dict[str, Any] = {"settings": len(whole), "failed": len(cases) - len(whole)}
    for kind in ("memory", "seconds"):
        ratios = [found[kind]["ratio"] for found in whole]
        last[kind] = {"least": min(ratios), "largest": max(ratios)}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
