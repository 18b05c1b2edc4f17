"""Time the merge of an adapter, on random models of 1.3 and 4 GB in bf16: python benchmarks/merge.py [--sizes 1.3,4].

Side by side, in turns, each in a process of its own that has imported what it needs before the clock starts:
- `cp`: cp -r of the base and sync of the copy, the least that a copy of such a folder takes;
- `peft`: load, merge_and_unload and save_pretrained by PEFT and transformers, and sync;
- `ours`: `export_hf` without its receipt: checks, merge, hashes of tensors and files, sync, rename.
Then `command`, the whole of `export_hf_checkpoint.py`, imports and receipt included, and the memory that the merge
takes: the peak of RssAnon over what the interpreter has with its imports.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import results_file

ROOT = Path(__file__).parent.parent
LAYERS = {"0.2": 1, "1.3": 10, "4": 36}
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16}


def make(folder: Path, layers: int) -> None:
    """Write a random Llama in bf16, in files of at most 1 GB, and an adapter of PEFT's on its q_proj and v_proj."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from lora_alpaca.models.base import demo_base
    from lora_alpaca.models.shards import ShardWriter
    from lora_alpaca.models.weights import TensorInfo

    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(demo_base()).save_pretrained(folder / "base")
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=layers, bos_token_id=1, eos_token_id=2, **SHAPE)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder / "base")
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config)
    infos = {name: TensorInfo(torch.bfloat16, tuple(tensor.shape)) for name, tensor in bare.state_dict().items()}
    noise = (0.02 * torch.randn(2**24)).to(torch.bfloat16)
    writer = ShardWriter(folder / "base", infos, 10**9)
    for number, (name, info) in enumerate(infos.items()):
        size = torch.Size(info.shape).numel()
        repeated = noise.roll(7919 * number).repeat(1 + size // noise.numel())[:size].reshape(info.shape)
        writer.write(name, torch.ones(info.shape, dtype=torch.bfloat16) if "norm" in name else repeated)
    writer.finish()
    transformers.utils.logging.set_verbosity_error()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(loaded, adapter).save_pretrained(folder / "adapter")


# ------------------------------------------------------------------------------ what is timed, each in its own process


def by_cp(folder: Path, out: Path) -> Callable[[], None]:
    """Return what copies the base."""

    def work() -> None:
        subprocess.run(["cp", "-r", folder / "base", out], check=True)
        subprocess.run(["sync", *out.iterdir()], check=True)

    return work


def by_peft(folder: Path, out: Path) -> Callable[[], None]:
    """Return what merges as PEFT's documentation does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401  imported beforehand

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        merged.save_pretrained(out, max_shard_size="1GB")
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(out)
        subprocess.run(["sync", *out.iterdir()], check=True)

    return work


def by_us(folder: Path, out: Path) -> Callable[[], None]:
    """Return what exports without a receipt."""
    import bitsandbytes  # noqa: F401  imported beforehand
    from transformers import LlamaForCausalLM  # noqa: F401

    from lora_alpaca import ExportConfig, export_hf
    from lora_alpaca.export import exporting  # noqa: F401

    config = ExportConfig(
        base_model=str(folder / "base"),
        lora_weights=str(folder / "adapter"),
        output_dir=str(out),
        prompt_template="alpaca",
        max_shard_size=10**9,
        receipt=False,
    )

    def work() -> None:
        export_hf(config)

    return work


WAYS = {"cp": by_cp, "peft": by_peft, "ours": by_us}


def timed(way: str, folder: Path, out: Path) -> None:
    """Print the seconds of one way, and the anonymous memory that it took, in MB, as JSON."""
    work = WAYS[way](folder, out)
    before, peak, ended = anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.004):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "extra_mb": max(0.0, peak - before)}))


def anonymous() -> float:
    """Return the anonymous memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


# ------------------------------------------------------------------------------------------------------------- the run


def run(way: str, folder: Path, out: Path) -> dict[str, float]:
    """Return what one way takes in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, __file__, "--way", way, "--folder", str(folder), "--out", str(out)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def whole_command(folder: Path, out: Path) -> float:
    """Return the seconds of the whole command, with imports and receipt."""
    shutil.rmtree(out, ignore_errors=True)
    words = [
        "--base_model", folder / "base", "--lora_weights", folder / "adapter", "--output_dir", out,
        "--prompt_template", "alpaca",
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "export_hf_checkpoint.py", *map(str, words)], check=True)
    return time.perf_counter() - began


def main() -> None:
    """Time all ways in turns and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1.3,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", type=Path, default=None, help="a folder on the disk to be measured")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.way:
        return timed(given.way, given.folder, given.out)
    figures = {}
    for size in given.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=given.place) as place:
            folder, out = Path(place) / "in", Path(place) / "out"
            make(folder, LAYERS[size])
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for number in range(given.rounds):
                for way in WAYS:
                    found[way].append(run(way, folder, out))
                    print(f"{size} GB, round {number + 1}, {way}: {found[way][-1]}", flush=True)
            ratios = [
                {way: ours["seconds"] / found[way][n]["seconds"] for way in WAYS}
                for n, ours in enumerate(found["ours"])
            ]
            figures[size] = {
                "seconds": {way: [round(one["seconds"], 2) for one in found[way]] for way in WAYS},
                "vs_cp": round(statistics.median(ratio["cp"] for ratio in ratios), 2),
                "vs_peft": round(statistics.median(1 / ratio["peft"] for ratio in ratios), 2),
                "extra_mb": round(max(one["extra_mb"] for one in found["ours"])),
                "extra_mb_of_peft": round(max(one["extra_mb"] for one in found["peft"])),
                "command_seconds": round(whole_command(folder, out), 1),
            }
            print(json.dumps({size: figures[size]}), flush=True)
    path = results_file.write("merge", {"command": f"python benchmarks/merge.py --sizes {given.sizes}", **figures})
    print(path)
    first = figures[given.sizes.split(",")[0]]
    print(json.dumps({key: first[key] for key in ("vs_cp", "vs_peft", "extra_mb", "command_seconds")}))


if __name__ == "__main__":
    main()
