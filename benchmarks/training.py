"""How fast is a training step, against what else there is? python benchmarks/training.py [--quick]

Seconds are those of the processor, with one thread: what else the machine does at the same time costs none. On a
machine with nothing else to do, `--threads N` takes N, and seconds on the wall.
One optimizer step on the same rows, model and optimizer batch, rivals and ours interleaved in one process with the same
allocator setting: the alpaca-lora recipe (8-bit, gradient checkpointing, padded micro-batches of 4), the same with like
lengths together, transformers' Trainer on an unquantised base, TRL's SFTTrainer with packing where it is installed, and
ours in 8-bit, 4-bit and unquantised, then with each technique switched off in turn. Unquantised is bf16 where the
machine computes in it natively, else fp32, for all of them. Then each of them once more in a process of its own, as it
is shipped, with its own allocator settings, and TRL with the gradient checkpointing that is its default: for its
seconds there, and its peak memory. Gradients are compared in fp32.

Random weights, and rows of random tokens whose lengths and shared preambles are those of Alpaca data. Writes
benchmarks/results/training-DATE.json; the last line is JSON. Under an hour on 2 cores; --quick is a small model, five
minutes and benchmarks/results/training_quick-DATE.json.
"""

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import rivals
import torch
import transformers
from results_file import write

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Example
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import Engine, EngineChoices, fitted
from lora_alpaca.engine.allocator import keep_large_buffers
from lora_alpaca.engine.equivalence import difference, loss_and_gradient
from lora_alpaca.engine.packing import pack, packs
from lora_alpaca.engine.reference import Reference
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.lora import LoraAdapter
from lora_alpaca.training.step import Stepper

BUDGET, VOCABULARY = 2048, 32_000
SHAPES = {  # rows: number of them, median and spread of the answers' lengths
    "short": (16, 38, 0.92),  # as in the original Alpaca data: about 120 tokens a row, half of them answer
    "long": (8, 125, 0.75),  # as GPT-4 answers the same instructions: about 230 tokens a row
}
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # of what is not quantised
OURS: dict[str, tuple[int, dict[str, Any]]] = {  # bits, settings
    "ours, 8-bit": (8, {}),
    "ours, 4-bit": (4, {}),
    "ours, unquantised": (16, {}),
    "ours, 8-bit, not compiled": (8, {"compiled": False}),
    "ours, 8-bit, nothing shared": (8, {"share_prefix": False}),
    "ours, 8-bit, padded": (8, {"engine": "padded"}),
}


def rows(shape: str, train_on_inputs: bool) -> list[Example]:
    """Return rows with the preambles and lengths of Alpaca data, of random tokens, the same at every call."""
    draw = random.Random(0)
    count, median, spread = SHAPES[shape]

    def tokens(number: float) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(max(1, round(number)))]

    beginning, response = tokens(10), tokens(5)
    preambles = [beginning + tokens(18), beginning + tokens(26)]  # without and with an input
    examples = []
    for _ in range(count):
        prompt = draw.choice(preambles) + tokens(draw.lognormvariate(3.0, 0.8)) + response
        answer = tokens(draw.lognormvariate(0, spread) * median)
        ids = (prompt + answer)[:512]
        first = 0 if train_on_inputs else len(prompt)
        examples.append(Example(np.array(ids), [(first, len(ids))] if first < len(ids) else []))
    return examples


ALONE = ("alpaca-lora recipe, 8-bit", "Trainer, unquantised", "TRL packing, unquantised", *list(OURS)[:3])


class Bench:
    """The variants on one model, shape and set of options; every base is loaded once, when it is first needed."""

    def __init__(self, folder: Path, world: World, examples: list[Example], dropout: float, as_shipped: bool = False):
        self.folder, self.world, self.examples = folder, world, examples
        self.dropout, self.as_shipped = dropout, as_shipped
        self.dtype = world.spec.dtype
        self._models: dict[Any, Any] = {}

    def model(self, bits: int, name: str = "ours") -> Any:
        """Return the model with its adapter; bits 8, 4 or 16 for the base."""
        if (bits, name) not in self._models:
            spec = DeviceSpec(self.world.device, self.dtype, bits)
            base = locate_base(str(self.folder))
            model = rivals.prepared(load_base(base, spec)[0], name)
            torch.manual_seed(0)
            model = lora.attach(model, FinetuneConfig(lora_dropout=self.dropout), base)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.02)
            self._models[bits, name] = model
        return self._models[bits, name]

    def fitted(self, model: Any, **changes: Any) -> Any:
        """Return the context of an engine of ours."""
        options: dict[str, Any] = {"engine": "packed", "token_budget": BUDGET, "micro_batch_size": 4, "compiled": True}
        choices, spec = EngineChoices(**options | changes), DeviceSpec(self.world.device, self.dtype, 16)
        return fitted(model, choices, spec, 0, self.examples, self.precision, is_proven=True)

    def precision(self) -> Any:
        """Return the context of a forward pass."""
        return nullcontext() if self.dtype == torch.float32 else self.world.autocast()

    def variants(self) -> dict[str, Callable[[], tuple[float, float | None]]]:
        """Return name -> a function that takes one optimizer step and returns its seconds and its mean loss."""
        found: dict[str, Callable[[], tuple[float, float | None]]] = {
            "alpaca-lora recipe, 8-bit": lambda: self._rival("alpaca-lora", 8),
            "alpaca-lora recipe, by length": lambda: self._rival("alpaca-lora", 8, by_length=True),
            "Trainer, unquantised": lambda: self._rival("Trainer", 16),
        }
        if find_spec("trl"):
            found["TRL packing, unquantised"] = lambda: self._rival("TRL", 16)
        ours = {
            name: lambda bits=bits, changes=changes: self._ours(bits, changes) for name, (bits, changes) in OURS.items()
        }
        return found | ours

    def _rival(self, name: str, bits: int, **options: Any) -> tuple[float, float | None]:
        model = self.model(bits, name)
        return rivals.step(name, model, self.examples, self.dtype, as_shipped=self.as_shipped, **options)

    def _ours(self, bits: int, changes: dict[str, Any]) -> tuple[float, float | None]:
        with self.fitted(self.model(bits), **changes) as (engine, _):
            config = FinetuneConfig()
            stepper = Stepper(engine, LoraAdapter(engine.model), Replicated(self.world), self.world, config, print)
            state = lora.state(engine.model)
            begun = rivals.clock()
            step = stepper.step(self.examples, 3e-4)
            seconds = rivals.clock() - begun
            lora.set_state(engine.model, state, "before")  # every run starts from the same adapter
        return seconds, step.loss

    def in_fp32(self) -> None:
        """Go on with models that compute in fp32."""
        self.dtype = torch.float32
        self._models.clear()

    def gradient_error(self, bits: int, changes: dict[str, Any]) -> float:
        """Return how far loss and gradients are off those of the library's model on each row alone, at dropout 0."""
        model, few = self.model(bits), self.examples[:4]
        model.eval()
        alone: Engine = Reference(model, self.world.device, None, 1, 0)
        with ExitStack() as stack:
            if bits == 8:  # bitsandbytes rounds activations to 8 bits out of training: compare with its exact forward
                alone = stack.enter_context(self.fitted(model, engine="padded", compiled=False))[0]
            expected = loss_and_gradient(alone, few, self.precision)
        with self.fitted(model, **changes) as (engine, _):
            return difference(loss_and_gradient(engine, few, self.precision), expected)

    def matmul_seconds(self) -> float:
        """Return what the matrix products of a step take by themselves, each shape timed alone, for our packs."""
        with self.fitted(self.model(16)) as (engine, _):
            return _matmul_seconds(engine, self.examples, self.dtype)


def _matmul_seconds(engine: Engine, examples: list[Example], dtype: torch.dtype) -> float:
    """Return the median seconds of all forward and backward products of frozen layers and head, summed."""
    config = engine.model.config
    layers = [
        (part.out_features, part.in_features, ".layers.0." in name and "self_attn.o_" not in name and "mlp" not in name)
        for name, part in engine.model.named_modules()
        if isinstance(part, torch.nn.Linear) and "lora_" not in name and "lm_head" not in name
        and not hasattr(part, "base_layer")
    ]  # fmt: skip
    total = 0.0
    known: dict[tuple[int, int, int, bool], float] = {}
    for numbers in packs(examples, BUDGET):
        packed = pack([examples[number] for number in numbers])
        tokens, predictions = packed.input_ids.numel(), len(packed.indices)
        head = (predictions, config.vocab_size, config.hidden_size, False)
        shapes = [*((tokens, out, width, first) for out, width, first in layers), head]
        for shape in shapes:  # the first layer's input has no gradient, so its q, k and v have none to pass on
            known[shape] = known.get(shape) or _product_seconds(*shape, dtype)
            total += known[shape]
    return total


def _product_seconds(tokens: int, out: int, width: int, forward_only: bool, dtype: torch.dtype) -> float:
    weight, x = torch.randn(out, width, dtype=dtype), torch.randn(tokens, width, dtype=dtype)
    by_y, seconds = torch.randn(tokens, out, dtype=dtype), []
    for _ in range(4):
        begun = rivals.clock()
        torch.mm(x, weight.t())
        if not forward_only:
            torch.mm(by_y, weight)
        seconds.append(rivals.clock() - begun)
    return statistics.median(seconds[1:])


def save_model(folder: Path, width: int, layers: int) -> None:
    """Write a random Llama of a width, as LLaMA's vocabulary and proportions are."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=int(width * 2.6875), num_hidden_layers=layers,
        num_attention_heads=max(8, width // 128), max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)


def table(bench: Bench, rounds: int) -> dict[str, Any]:
    """Return the figures of every variant: medians over interleaved rounds, after one with few rows not counted."""
    seconds: dict[str, list[float]] = {}
    losses: dict[str, float | None] = {}
    variants = bench.variants()
    names, whole = list(variants), bench.examples
    for round_ in range(rounds + 1):
        bench.examples = whole if round_ else whole[:4]
        shift = round_ * 3 % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            taken, losses[name] = variants[name]()
            seconds.setdefault(name, []).extend([taken] if round_ else [])
            print(f"    round {round_}  {name:34} {taken:7.2f} s", flush=True)
    tokens = sum(len(example.ids) for example in bench.examples)
    figures: dict[str, Any] = {}
    for name in names:
        median = statistics.median(seconds[name])
        figures[name] = {
            "seconds": round(median, 3), "runs": [round(value, 3) for value in seconds[name]],
            "tokens_per_second": round(tokens / median), "rows_per_second": round(len(bench.examples) / median, 2),
            "loss": losses[name],
        }  # fmt: skip
    figures["ours, unquantised"]["matmul_share"] = bench.matmul_seconds() / figures["ours, unquantised"]["seconds"]
    bench.in_fp32()
    for name, (bits, changes) in OURS.items():
        figures[name]["gradient_error"] = bench.gradient_error(bits, changes)
    return figures


def ratios(seconds: dict[str, float], precision: str) -> dict[str, float | None]:
    """Return how many times faster ours is than each rival in the same precision."""

    def ratio(rival: str, ours: str) -> float | None:
        return round(seconds[rival] / seconds[ours], 2) if rival in seconds else None

    return {
        "vs_alpaca_lora": ratio("alpaca-lora recipe, 8-bit", "ours, 8-bit"),
        f"vs_trainer_{precision}": ratio("Trainer, unquantised", "ours, unquantised"),
        "vs_trl": ratio("TRL packing, unquantised", "ours, unquantised"),
    }


def headline(figures: dict[str, Any], precision: str) -> dict[str, Any]:
    """Return the line that sums a table up."""
    return {
        **ratios({name: found["seconds"] for name, found in figures.items()}, precision),
        "roofline_share": round(figures["ours, unquantised"]["matmul_share"], 2),
        "max_gradient_error": max(figures[name]["gradient_error"] for name in OURS),
    }


def alone(folder: Path, name: str, shape: str, asked: argparse.Namespace) -> dict[str, float]:
    """Return seconds and peak memory of a variant in a process of its own, with the settings it is shipped with."""
    command = [sys.executable, __file__, "--alone", name, "--folder", str(folder), "--shape", shape]
    command += ["--threads", str(asked.threads), *["--upstream"] * asked.upstream]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_megabytes() -> int:
    """Return the most memory that this process has had at once (that of `getrusage` is its parent's at first)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) // 1024


def main() -> None:
    """Run the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 512, short rows, 3 rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--upstream", action="store_true", help="dropout 0.05 and train_on_inputs True")
    parser.add_argument("--threads", type=int, default=1, help="above 1, seconds are those on the wall")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(asked.threads)
    config = FinetuneConfig(dtype="auto", device="cpu", lora_dropout=0.0)
    dropout = 0.05 if asked.upstream else 0.0
    if asked.quick:
        asked.width, asked.layers, asked.shape, asked.rounds = 512, 8, ["short"], 3

    with World(config) as world, tempfile.TemporaryDirectory() as temporary:
        folder, precision = Path(asked.folder or temporary), PRECISIONS[world.spec.dtype]
        if asked.alone:
            examples = rows(asked.shape[0], asked.upstream)
            variant = Bench(folder, world, examples, dropout, as_shipped=True).variants()[asked.alone]
            seconds = [variant()[0] for _ in range(2)]
            print(json.dumps({"seconds": round(seconds[1], 3), "peak_megabytes": peak_megabytes()}))
            return
        keep_large_buffers()
        save_model(folder, asked.width, asked.layers)
        options = {
            "width": asked.width, "layers": asked.layers, "vocabulary": VOCABULARY, "dropout": dropout,
            "train_on_inputs": asked.upstream, "compute": precision, "rounds": asked.rounds, "threads": asked.threads,
        }  # fmt: skip
        kind = "training" + ("_quick" if asked.quick else "") + ("_upstream" if asked.upstream else "")
        kind += f"_{asked.threads}_threads" if asked.threads > 1 else ""
        tables, headlines = {}, {}
        for shape in asked.shape or SHAPES:
            examples = rows(shape, asked.upstream)
            print(f"{shape} rows: {len(examples)}, {sum(len(example.ids) for example in examples)} tokens")
            bench = Bench(folder, world, examples, dropout)
            figures = tables[shape] = table(bench, asked.rounds)
            headlines[shape] = headline(figures, precision)
            del bench
            gc.collect()
            for name in () if asked.quick else filter(figures.__contains__, ALONE):
                figures[name]["alone"] = alone(folder, name, shape, asked)
                print(f"    alone    {name:34} {figures[name]['alone']}", flush=True)
            if not asked.quick:
                as_shipped = {name: figures[name]["alone"]["seconds"] for name in ALONE if name in figures}
                headlines[shape]["as_shipped"] = ratios(as_shipped, precision)
            write(kind, {"options": options, "headlines": headlines, "tables": tables})
        for shape, figures in tables.items():
            for name, found in figures.items():
                print(f"{shape:6} {name:34} {found['seconds']:8.2f} s {found['tokens_per_second']:7} tokens/s", end="")
                print(f"  gradients {found['gradient_error']:.0e}" if "gradient_error" in found else "")
        print(json.dumps(headlines["short"] if asked.quick else headlines))


if __name__ == "__main__":
    main()
