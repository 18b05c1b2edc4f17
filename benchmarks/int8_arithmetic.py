"""Would 8-bit layers that multiply in 8 bits train faster, as well? python benchmarks/int8_arithmetic.py --part PART

Today's layers convert int8 weights to bf16 and multiply in bf16. Here activations are rounded to int8, each row by its
largest number, and the product is one of int8 numbers: in the forward pass, and in the backward pass too, where the
rows of the gradient are rounded. `columns apart` is LLM.int8's: columns in which an activation is larger than 6 are
multiplied in bf16. Rounding and rescaling are compiled.

`--part products`: operations a second of torch's kernels, at the shapes of SmolLM2-135M and of models of 1B and 7B.
`--part steps`: a whole step of SmolLM2-135M-Instruct, which `make real` fetches, and of random Llamas as wide as models
of 1B and 7B, all ways interleaved. `--part errors`: the loss on held-out rows before training, and how far the gradient
is off that in fp32. `--part losses`: the loss on held-out rows after a short training, for some seeds, computed as it
was trained, and as today. `--data` are instructions in Alpaca format. One thread, processor time, medians. Adds to
benchmarks/results/int8_arithmetic-DATE.json; the last line is JSON.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import real_model
import torch
import transformers
from int8_ways import WAYS, Rounding, computing
from results_file import RESULTS, write

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Example
from lora_alpaca.engine import Engine, EngineChoices, fitted
from lora_alpaca.engine.allocator import keep_large_buffers
from lora_alpaca.engine.equivalence import difference, loss_and_gradient
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec

TOKENS = (400, 1024)
SHAPES = [(576, 192), (576, 576), (576, 1536), (1536, 576), (2048, 2048), (2048, 5632), (4096, 4096), (4096, 11008)]
WIDE = {  # layers and sizes of random Llamas; the head is as small a part as it is in the whole model
    "1B shapes": {"num_hidden_layers": 4, "hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4},
    "7B shapes": {"num_hidden_layers": 2, "hidden_size": 4096, "intermediate_size": 11008, "num_key_value_heads": 32},
}
VOCABULARY = 4096  # of the random Llamas
QV = ["q_proj", "v_proj"]
REAL = {"SmolLM2-135M, q/v": QV, "SmolLM2-135M, all-linear": ["all-linear"]}
BATCH, RATE, HELD_OUT, CUTOFF = 4, 1e-3, 40, 256  # rows of a step, peak rate, rows that measure, tokens of a row


# ----------------------------------------------------------------------------------------------------------- products


def products() -> Iterator[dict[str, Any]]:
    """Yield the median giga-operations a second of every kernel, shape by shape."""
    for tokens in TOKENS:
        for inputs, outputs in SHAPES:
            kernels = kernels_of(tokens, inputs, outputs)
            operations = 2 * tokens * inputs * outputs
            repeated, seconds = max(1, int(3e9 / operations)), {name: list[float]() for name in kernels}
            for round_ in range(8 if operations < 1e10 else 4):
                for name, kernel in kernels.items():
                    begun = time.process_time()
                    for _ in range(repeated):
                        kernel()
                    if round_:
                        seconds[name].append((time.process_time() - begun) / repeated)
            rates = {name: round(1e-9 * operations / statistics.median(taken)) for name, taken in seconds.items()}
            yield {"giga_operations_per_second": {f"{tokens} x {inputs} x {outputs}": rates}}


def kernels_of(tokens: int, inputs: int, outputs: int) -> dict[str, Callable[[], Any]]:
    """Return products of activations [tokens, inputs] with weights [outputs, inputs].

    Not among them: `qlinear_pointwise` with signed activations, which has no fast kernel and takes seconds.
    """
    x, weight = torch.randn(tokens, inputs).bfloat16(), torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    values = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8)
    unsigned, scale = (values.int() + 128).to(torch.uint8), torch.rand(outputs)
    zeros, in_bf16, other_way = torch.zeros(outputs, dtype=torch.int64), weight.bfloat16(), weight.t().contiguous()
    packed = torch.ops.onednn.qlinear_prepack(weight, [tokens, inputs])
    quantised = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
    dynamic, in_fp32, scale_in_bf16 = torch.ops.quantized.linear_prepack(quantised, None), x.float(), scale.bfloat16()
    return {
        "bf16": lambda: x @ in_bf16.t(),
        "bf16, weights converted": lambda: x @ weight.to(x.dtype).t(),
        "_int_mm": lambda: torch._int_mm(values, weight.t()),
        "_int_mm, as in the backward pass": lambda: torch._int_mm(values, other_way),
        "onednn.qlinear_pointwise, prepacked": lambda: torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        ),
        "quantized.linear_dynamic, prepacked": lambda: torch.ops.quantized.linear_dynamic(in_fp32, dynamic, False),
        "_weight_int8pack_mm": lambda: torch._weight_int8pack_mm(x, weight, scale_in_bf16),
    }


# ------------------------------------------------------------------------------------------------- steps and trainings


def precision(dtype: torch.dtype) -> Any:
    """Return the context of a forward pass."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def engine_of(
    folder: str, targets: list[str], rows: Sequence[Example], dtype: torch.dtype = torch.bfloat16
) -> Iterator[Engine]:
    """Yield the engine of an 8-bit base with a new adapter, which packs, its pointwise functions compiled."""
    base, spec = locate_base(folder), DeviceSpec(torch.device("cpu"), dtype, 8)
    torch.manual_seed(0)
    options = FinetuneConfig(lora_dropout=0.0, lora_target_modules=targets)
    model = lora.attach(load_base(base, spec)[0], options, base)
    choices = EngineChoices(engine="packed", token_budget=2048, micro_batch_size=BATCH, compiled=True)
    with fitted(model, choices, spec, 0, rows, partial(precision, dtype), is_proven=True) as (engine, _):
        yield engine


def gradient(engine: Engine, rows: Sequence[Example]) -> float:
    """Put the gradient of the mean loss of some rows into the parameters, and return that loss."""
    labels, loss = sum(row.num_labels() for row in rows), 0.0
    for batch in engine.batches(rows):
        with precision(torch.bfloat16):
            part = engine.loss(batch) / labels
        part.backward()
        loss += part.item()
    return loss


def steps(rows: Sequence[Example], rounds: int, models: Sequence[str], ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the median seconds of a step in every way, and how many times faster than today's it is, by model."""
    for name in models:
        if name in REAL:
            yield {"steps": {name: timed(str(real_model.FOLDER), REAL[name], rows, rounds, ways)}}
            continue
        config = transformers.LlamaConfig(
            **WIDE[name], num_attention_heads=32, vocab_size=VOCABULARY, tie_word_embeddings=False, dtype=torch.bfloat16
        )
        small = [Example(row.ids % VOCABULARY, list(row.spans)) for row in rows]
        with tempfile.TemporaryDirectory() as folder:
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
            yield {"steps": {name: timed(folder, QV, small, rounds, ways)}}


def timed(folder: str, targets: list[str], rows: Sequence[Example], rounds: int, ways: Sequence[str]) -> dict[str, Any]:
    """Return what `steps` tells of one model."""
    draw, rounding = random.Random(0), Rounding()
    seconds = {name: list[float]() for name in ways}
    with engine_of(folder, targets, rows) as engine:
        engine.model.train()
        optimizer = torch.optim.AdamW([one for one in engine.model.parameters() if one.requires_grad], lr=1e-6)
        for round_ in range(rounds + 1):
            chosen = [rows[number] for number in draw.sample(range(len(rows)), BATCH)]
            for name in ways:
                with computing(WAYS[name], rounding):
                    begun = time.process_time()
                    optimizer.zero_grad()
                    gradient(engine, chosen)
                    optimizer.step()
                    if round_:  # the first compiles
                        seconds[name].append(time.process_time() - begun)
            print(round_, {name: round(taken[-1], 3) for name, taken in seconds.items() if taken}, flush=True)
    return {
        "rounds": rounds,
        "seconds": {name: round(statistics.median(taken), 3) for name, taken in seconds.items()},
        "times_faster": {
            name: round(statistics.median(a / b for a, b in zip(seconds["today"], taken, strict=True)), 3)
            for name, taken in seconds.items()
        },
    }


def errors(rows: Sequence[Example], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the held-out loss before training, and the error of the gradient of a few rows, way by way."""
    held_out, real, rounding = rows[:HELD_OUT], str(real_model.FOLDER), Rounding()
    with engine_of(real, ["all-linear"], rows, torch.float32) as exact:
        judge = loss_and_gradient(exact, held_out[:BATCH])
    with engine_of(real, ["all-linear"], rows) as engine:
        engine.model.eval()
        for name in names:
            rounding.columns.clear()
            with computing(WAYS[name], rounding):
                found = {"loss": held_out_loss(engine, held_out)}
                own = loss_and_gradient(engine, held_out[:BATCH], partial(precision, torch.bfloat16))
            found["gradient_error"] = float(f"{difference(own, judge):.2g}")
            if WAYS[name].apart:
                found["columns_apart"] = round(statistics.mean(rounding.columns), 1)
            yield {"before_training": {name: found}}


def losses(
    rows: Sequence[Example], seeds: Sequence[int], number: int, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the held-out losses after a short training, seed by seed and way by way."""
    held_out, train, rounding = rows[:HELD_OUT], rows[HELD_OUT:], Rounding()
    with engine_of(str(real_model.FOLDER), ["all-linear"], rows) as engine:
        for seed in seeds:
            for name in names:
                with computing(WAYS[name], rounding):
                    training(engine, train, seed, number)
                    found = {"computed_alike": held_out_loss(engine, held_out)}
                if name != "today":  # as the adapter is used
                    found["computed_as_today"] = held_out_loss(engine, held_out)
                yield {f"after {number} steps": {f"seed {seed}, {name}": found}}


def training(engine: Engine, rows: Sequence[Example], seed: int, number: int) -> None:
    """Train a new adapter for a few steps, at a rate that falls to zero."""
    torch.manual_seed(seed)
    for name, parameter in engine.model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
        elif "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    learning = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    optimizer, draw = torch.optim.AdamW(learning, lr=RATE, weight_decay=0), random.Random(seed)
    engine.model.train()
    for step in range(number):
        optimizer.zero_grad()
        gradient(engine, [rows[number] for number in draw.sample(range(len(rows)), BATCH)])
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 4) * (1 - step / number)
        optimizer.step()


@torch.no_grad()
def held_out_loss(engine: Engine, rows: Sequence[Example]) -> float:
    """Return the mean loss of a label."""
    engine.model.eval()
    total = 0.0
    for batch in engine.batches(rows):
        with precision(torch.bfloat16):
            total += engine.loss(batch).item()
    return round(total / sum(row.num_labels() for row in rows), 5)


def main() -> None:
    """Measure one part, and add it to what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["products", "steps", "errors", "losses"], required=True)
    parser.add_argument("--data", help="instructions in Alpaca format, for all but products")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="*", default=[*REAL, *WIDE], help="for steps")
    parser.add_argument("--steps", type=int, default=40, help="of a training, for losses")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="`today` first")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_large_buffers()
    rows = (
        [Example(np.array(ids), spans) for ids, spans in real_model.encoded(asked.data, CUTOFF)] if asked.data else []
    )
    measured = {
        "products": lambda: products(),
        "steps": lambda: steps(rows, asked.rounds, asked.models, asked.ways),
        "errors": lambda: errors(rows, asked.ways),
        "losses": lambda: losses(rows, asked.seeds, asked.steps, asked.ways),
    }[asked.part]()
    for figures in measured:
        add(figures)
        print(json.dumps(figures), flush=True)


def add(figures: dict[str, dict[str, Any]]) -> None:
    """Add figures to the file of the day."""
    file = RESULTS / f"int8_arithmetic-{datetime.datetime.now(datetime.UTC).date().isoformat()}.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for kind, found in figures.items():
        known[kind] = known.get(kind, {}) | found
    write("int8_arithmetic", known | {"held_out_rows": HELD_OUT, "batch": BATCH, "rate": RATE, "cutoff": CUTOFF})


if __name__ == "__main__":
    main()
