"""How many tokens a second, here, as upstream did it, by plain transformers, and by llama.cpp?

python benchmarks/generation.py [--quick] [--models demo,real,random] [--rounds 3]

Three models with an adapter on q_proj and v_proj: the demo's, SmolLM2-135M (`make real` fetches it), and a random Llama
of 290 million parameters. Every way of answering is a process of its own that has loaded its model before the clock
starts; the ways take turns, and figures are medians over rounds. Greedy, from prompts of 48 random ids:
- `merged`, `beside`, `8-bit`, `4-bit`: ours, the adapter in the weights or beside them; at 1, 8 and 32 at a time;
- `generate`: transformers' generate of the merged model; `generate, PEFT`: with PEFT's adapter beside the weights;
- `upstream, greedy` and `upstream, beams`: as alpaca-lora: 8-bit, PEFT's adapter beside; its page has 4 beams;
- `llama.cpp f16` and `llama.cpp q8_0`: of our own GGUF; left out where the environment `llama_cpp` has not been made.
The limit is what the memory can deliver: weights that a token needs over the bandwidth of a sum over 1 GB.
Greedy ids in fp32 are compared with those of transformers. The last line is JSON; targets are in the table that is
printed before it.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "clients")]

from results_file import write  # noqa: E402

PROMPT = 48  # tokens
OURS: dict[str, dict[str, Any]] = {
    "merged": {"merge_adapter": "true"},
    "beside": {"merge_adapter": "false"},
    "8-bit": {"load_8bit": True},
    "4-bit": {"load_4bit": True},
}
THEIRS = ("generate", "generate, PEFT", "upstream, greedy", "upstream, beams")
LLAMA = {"llama.cpp f16": "f16", "llama.cpp q8_0": "q8_0"}
TARGETS = {"vs_upstream": 3.0, "vs_generate": 1.3, "vs_generate_32": 4.0, "vs_llamacpp": 0.5}
Answer = Callable[[list[list[int]], int], list[list[int]]]


# ---------------------------------------------------------------------------------------------------------- the models


def make(name: str, folder: Path) -> dict[str, Any]:
    """Write an adapter, a merged model and GGUF files, and return where everything is."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from lora_alpaca import ExportConfig, export_hf
    from lora_alpaca.models.base import demo_base

    torch.manual_seed(0)
    if name == "demo":
        base = demo_base()
    elif name == "real":
        import real_model

        base = real_model.FOLDER
    else:
        base = folder / "base"
        config = transformers.LlamaConfig(
            vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16,
            num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=True, dtype=torch.bfloat16,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
        transformers.AutoTokenizer.from_pretrained(demo_base()).save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folder / "adapter")
    where = {"base": str(base), "adapter": str(folder / "adapter")}
    options: dict[str, Any] = {"base_model": str(base), "lora_weights": where["adapter"], "prompt_template": "alpaca"}
    for kind in ("f16", "q8_0"):
        out = folder / kind
        export_hf(ExportConfig(**options, output_dir=str(out), format=["gguf"], gguf_type=kind, receipt=False))
        where[kind] = str(next(out.rglob("*.gguf")))
    return where | {"vocabulary": model.config.vocab_size}


def weights(model: Any) -> int:
    """Return the bytes that a token needs of a model's weights: all but the rows of embeddings that are no head."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    found = {id(p): p for name, p in model.named_parameters()}
    if head is not embeddings:
        found.pop(id(embeddings), None)
    return sum(p.numel() * p.element_size() for p in found.values())


def bandwidth() -> float:
    """Return how many bytes a second are read by a sum over 1 GB."""
    import torch

    values, best = torch.ones(2**28), float("inf")
    for _ in range(7):
        begun = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - begun)
    return values.numel() * 4 / best


# ------------------------------------------------------------------------------------ the ways, each in its own process


def by_us(where: dict[str, Any], way: str, dtype: str) -> tuple[Answer, Callable[[], int]]:
    """Return what answers prompts at the same time, and what tells the bytes of the weights."""
    from lora_alpaca import Generator
    from lora_alpaca.inference.layers import kernels
    from lora_alpaca.inference.sampling import Request, Sampling

    kernels.load() or kernels.compile_source()  # as it is after the first long answer on a machine
    options = {"base_model": where["base"], "prompt_template": "alpaca", "device": "cpu", "dtype": dtype}
    generator = Generator.load(where["adapter"], **options, **OURS[way], max_batch=32)

    def answer(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        asked = [Request(ids, Sampling(temperature=0, max_new_tokens=tokens), (), "adapter") for ids in prompts]
        streams = [generator.token_generator.generate(request) for request in asked]
        return [[token.id for step in stream for token in step] for stream in streams]

    return answer, lambda: weights(generator.token_generator._loop.adapters.model)  # type: ignore[attr-defined]


def by_transformers(where: dict[str, Any], way: str, dtype: str) -> tuple[Answer, Callable[[], int]]:
    """Return what answers prompts one after another."""
    import torch
    import transformers
    from peft import PeftModel

    from lora_alpaca.models import quantization
    from lora_alpaca.models.device import DTYPES, has_bf16

    chosen = DTYPES.get(dtype) or (torch.bfloat16 if has_bf16(torch.device("cpu")) else torch.float32)
    config = quantization.bnb_config(8, chosen) if way.startswith("upstream") else None
    load = transformers.AutoModelForCausalLM.from_pretrained
    model: Any = load(where["base"], dtype=chosen, quantization_config=config)
    model = PeftModel.from_pretrained(model, where["adapter"]).eval()
    if way == "generate":
        model = model.merge_and_unload()
    beams = {"num_beams": 4} if way == "upstream, beams" else {}

    def answer(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **beams}
            with torch.inference_mode():
                made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            found.append(made[0, len(prompt) :].tolist())
        return found

    return answer, lambda: weights(model)


LLAMA_CPP = """
import json, sys, time
from llama_cpp import Llama
path, threads = sys.argv[1:]
model = Llama(path, n_ctx=512, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
print(json.dumps({"bytes": 0}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    begun, found = time.perf_counter(), []
    for prompt in asked["prompts"]:
        model.reset()
        ids = []
        for token in model.generate(prompt, temp=0.0, reset=False):
            ids.append(token)
            if len(ids) == asked["tokens"]:
                break
        found.append(ids)
    print(json.dumps({"seconds": time.perf_counter() - begun, "ids": found}), flush=True)
"""


def serve(where: dict[str, Any], way: str, dtype: str) -> None:
    """Load a way's model, and answer the prompts of every line with ids and seconds."""
    answer, size = (by_us if way in OURS else by_transformers)(where, way, dtype)
    print("\n" + json.dumps({"bytes": size()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        begun = time.perf_counter()
        found = answer(asked["prompts"], asked["tokens"])
        print("\n" + json.dumps({"seconds": time.perf_counter() - begun, "ids": found}), flush=True)


class Worker:
    """A way of answering in a process of its own."""

    def __init__(self, way: str, where: dict[str, Any], threads: int, dtype: str = "auto"):
        words = [sys.executable, __file__, "--serve", json.dumps([where, way, dtype])]
        if way in LLAMA:
            environments = importlib.import_module("environments")  # of tests/clients
            words = [str(environments.python_of("llama_cpp")), "-c", LLAMA_CPP, where[LLAMA[way]], str(threads)]
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            words, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.bytes = self._read()["bytes"]

    def ask(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """Return seconds and ids of the answers."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"a way of answering ended: {self.process.args!r:.200}")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# -------------------------------------------------------------------------------------------------------------- the run


def measure(name: str, where: dict[str, Any], rounds: int, tokens: int, threads: int) -> dict[str, Any]:
    """Return the figures of a model."""
    import random

    environments = importlib.import_module("environments")  # of tests/clients
    draw = random.Random(0)
    prompts = [[draw.randrange(3, where["vocabulary"]) for _ in range(PROMPT)] for _ in range(32)]
    ways = [*OURS, *THEIRS, *(LLAMA if environments.is_there("llama_cpp") else ())]
    workers = {way: Worker(way, where, threads) for way in ways}
    rates: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for way, worker in workers.items():
            for many in (1, 8, 32) if way in OURS else (1,):
                asked = prompts[:many] if many > 1 else [prompts[number % 32]]
                seconds = worker.ask(asked, tokens)["seconds"]
                if number:  # the first is for warming up
                    rates.setdefault(f"{way} x{many}", []).append(many * tokens / seconds)
    for worker in workers.values():
        worker.close()
    exact = [Worker(way, where, threads, "fp32") for way in ("merged", "generate")]
    ours, theirs = ([worker.ask([prompt], tokens)["ids"][0] for prompt in prompts[:8]] for worker in exact)
    together = exact[0].ask(prompts[:8], tokens)["ids"]
    for worker in exact:
        worker.close()
    medians = {key: round(statistics.median(found), 1) for key, found in rates.items()}
    read = bandwidth()
    limits = {way: round(read / workers[way].bytes, 1) for way in OURS if workers[way].bytes}
    return {
        "tokens_per_second": medians,
        "limit": limits,
        "greedy_identical_in_fp32": f"{sum(map(list.__eq__, ours, theirs))} of 8",
        "greedy_identical_8_at_a_time": f"{sum(map(list.__eq__, together, theirs))} of 8",
        **ratios(medians, limits),
    }


def ratios(rate: dict[str, float], limits: dict[str, float]) -> dict[str, float | None]:
    """Return the ratios that have targets."""
    llama = {"merged x1": "llama.cpp f16 x1", "8-bit x1": "llama.cpp q8_0 x1"}
    found = [rate[ours] / rate[theirs] for ours, theirs in llama.items() if theirs in rate]
    return {
        "vs_upstream": round(rate["8-bit x1"] / rate["upstream, beams x1"], 2),
        "vs_generate": round(rate["merged x1"] / rate["generate x1"], 2),
        "vs_generate_32": round(rate["merged x32"] / rate["generate x1"], 2),
        "vs_llamacpp": round(min(found), 2) if found else None,
        "bandwidth_share": round(rate["merged x1"] / limits["merged"], 2),
    }


def main() -> None:
    """Measure all models and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short answers; nothing is written")
    parser.add_argument("--models", default="demo,real,random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(*json.loads(given.serve))
    real_model = importlib.import_module("real_model")  # of tests
    names = [name for name in given.models.split(",") if name != "real" or real_model.is_there()]
    rounds, tokens = (1, 16) if given.quick else (given.rounds, 64)
    figures: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(name, make(name, Path(folder)), rounds, tokens, given.threads)
        print(json.dumps({name: figures[name]}, indent=1), flush=True)
    worst = {
        key: min(found) if (found := [one[key] for one in figures.values() if one[key] is not None]) else None
        for key in (*TARGETS, "bandwidth_share")
    }
    for key, target in TARGETS.items():
        print(
            f"{key:16} {worst[key]} (target: {target} or more); "
            + ", ".join(f"{n} {f[key]}" for n, f in figures.items())
        )
    if not given.quick:
        options = {"tokens": tokens, "prompt": PROMPT, "rounds": rounds, "threads": given.threads}
        print(write("generation", {"command": "python benchmarks/generation.py", **options, "models": figures}))
    print(json.dumps(worst))


if __name__ == "__main__":
    main()
