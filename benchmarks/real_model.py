"""How exact, and how fast, is a step on a really pretrained model? python benchmarks/real_model.py --data ROWS.json

The model is SmolLM2-135M-Instruct, which `make real` fetches. `--part gradient`: of the gradient of packs, of padded
rows and of rows with torch's own loss in fp32, how far each is off that of fp64. `--part precisions`: whether packs are
taken, and what the check at start measures. `--part steps --old COMMIT`: processor seconds of the check and of a step
of the tree and of a commit, each in a process of its own, in interleaved pairs on the same rows; medians. One thread.

ROWS.json are instructions in Alpaca format; `--cutoff` tokens of each are used. Every part adds its figures to
benchmarks/results/real_model-DATE.json.
"""

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("LORA_ALPACA_REAL") or Path.home() / ".cache/lora_alpaca_real/SmolLM2-135M-Instruct")
MICRO_BATCH, BUDGET, ROWS = 4, 2048, 16  # rows padded together, tokens of a pack, rows of a step
PRECISIONS = [(bits, dtype) for dtype in (torch.float32, torch.bfloat16) for bits in (16, 8, 4)]


def loaded(bits: int, dtype: torch.dtype) -> Any:
    """Return the model with a new adapter, the same at every call."""
    from lora_alpaca.config import FinetuneConfig
    from lora_alpaca.models import lora
    from lora_alpaca.models.base import load_base, locate_base
    from lora_alpaca.models.device import DeviceSpec

    base = locate_base(str(FOLDER))
    torch.manual_seed(0)
    model, _ = load_base(base, DeviceSpec(torch.device("cpu"), dtype, bits))
    return lora.attach(model, FinetuneConfig(lora_dropout=0.0), base)


def fit(
    model: Any, bits: int, dtype: torch.dtype, rows: Any, engine: Literal["auto", "packed", "padded"] = "auto"
) -> Any:
    """Return the context of the engine of a model."""
    from lora_alpaca.engine import EngineChoices, fitted
    from lora_alpaca.models.device import DeviceSpec

    choices = EngineChoices(engine=engine, token_budget=BUDGET, micro_batch_size=MICRO_BATCH)
    precision = nullcontext if dtype == torch.float32 else partial(torch.autocast, "cpu", dtype)
    return fitted(model, choices, DeviceSpec(torch.device("cpu"), dtype, bits), 0, rows, precision)


def encoded(data: str, cutoff: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return ids and learned spans of the rows of a file, those that have an answer within the cutoff."""
    from lora_alpaca.config import FinetuneConfig
    from lora_alpaca.data.encoding import Encoder
    from lora_alpaca.models.base import locate_base
    from lora_alpaca.models.tokenizer import load_tokenizer
    from lora_alpaca.prompts import Conversation, load_template

    tokenizer, _ = load_tokenizer(locate_base(str(FOLDER)))
    encoder = Encoder.from_options(tokenizer, load_template("alpaca").bound(tokenizer), FinetuneConfig())
    rows = [
        Conversation.of(row["instruction"], row["input"], row["output"]) for row in json.loads(Path(data).read_text())
    ]
    cut = [row.cut(cutoff) for row in encoder.encode(rows)]
    return [(row.ids.tolist(), row.spans) for row in cut if row.spans]


def gradient(rows: Any) -> dict[str, Any]:
    """Return how far gradients in fp32, of the longest row and three others, are off that of fp64."""
    from lora_alpaca.engine.equivalence import difference, loss_and_gradient, sample
    from lora_alpaca.engine.reference import Reference, computing_in

    class InFp32(Reference):
        def compute(self, batch: Any) -> torch.Tensor:
            logits = self.model(**batch.inputs(), use_cache=False).logits.flatten(0, 1)
            return F.cross_entropy(logits.index_select(0, batch.indices).float(), batch.labels, reduction="none")

    few, model = sample(rows), loaded(16, torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.eval()
    alone = (model, torch.device("cpu"), None, 1, 0)
    with computing_in(model, torch.float64):
        judge = loss_and_gradient(Reference(*alone), few)
    found = {
        "rows alone, loss in fp64": difference(loss_and_gradient(Reference(*alone), few), judge),
        "rows alone, F.cross_entropy in fp32": difference(loss_and_gradient(InFp32(*alone), few), judge),
    }
    engines: tuple[Literal["packed", "padded"], ...] = ("packed", "padded")
    for engine in engines:
        with fit(model, 16, torch.float32, few, engine) as (fitted_engine, _):
            found[engine] = difference(loss_and_gradient(fitted_engine, few), judge)
    return {"gradient_error_in_fp32": found}


def precisions(rows: Any, which: list[str]) -> dict[str, Any]:
    """Return for every precision whether packs are taken, and the comparisons of the check at start."""
    from lora_alpaca.engine import equivalence, fitting

    found: dict[str, Any] = {}
    original, seen = equivalence.compare, list[Any]()

    def compare(*args: Any, **options: Any) -> Any:
        seen.append(original(*args, **options))
        return seen[-1]

    for module in (equivalence, fitting):
        module.compare = compare  # type: ignore[attr-defined]
    for bits, dtype in PRECISIONS:
        name = f"{bits}-bit base, {str(dtype).removeprefix('torch.')}"
        if which and not any(word in name for word in which):
            continue
        seen.clear()
        begun = time.process_time()
        with fit(loaded(bits, dtype), bits, dtype, rows) as (engine, notes):
            errors = {one.where.strip() or "the whole model": [one.error, one.limit] for one in seen}
            found[name] = {"engine": engine.name, "error_and_limit": errors, "notes": notes[:-1]}
            found[name]["seconds"] = round(time.process_time() - begun, 1)
        print(name, json.dumps(found[name]), flush=True)
    return {"packs": found}


def serve(rows: Any) -> None:
    """Fit the 8-bit model, print what was found, and then for every line of row numbers the seconds of a step."""
    model = loaded(8, torch.float32)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    begun = time.process_time()
    with fit(model, 8, torch.float32, rows) as (engine, notes):
        print(json.dumps({"engine": engine.name, "notes": notes, "check": time.process_time() - begun}), flush=True)
        for line in sys.stdin:
            batch_rows = [rows[number] for number in json.loads(line)]
            labels, loss, begun = sum(row.num_labels() for row in batch_rows), 0.0, time.process_time()
            optimizer.zero_grad()
            for batch in engine.batches(batch_rows):
                part = engine.loss(batch) / labels
                part.backward()
                loss += part.item()
            optimizer.step()
            print(json.dumps({"seconds": time.process_time() - begun, "loss": loss}), flush=True)


def steps(old: str, data: str, rows: Any, pairs: int, cutoff: int) -> dict[str, Any]:
    """Return the seconds of check and step of a commit and of the tree, on rows cut to so many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder)
        archive = subprocess.run(["git", "archive", old, "lora_alpaca"], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        (before / "rows.json").write_text(data)
        workers, said = dict[str, subprocess.Popen[str]](), {}
        for name, tree in (("before", before), ("after", ROOT)):
            command = [sys.executable, __file__, "--serve", str(before / "rows.json")]
            environment = os.environ | {"PYTHONPATH": str(tree)}
            workers[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            said[name] = _asked(workers[name])
        draw = random.Random(0)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        losses: dict[str, list[float]] = {name: [] for name in workers}
        for pair in range(pairs + 1):
            numbers = draw.sample(range(len(rows)), ROWS)
            for name, worker in workers.items():
                answer = _asked(worker, json.dumps(numbers) + "\n")
                if pair:  # the first is for warming up
                    seconds[name].append(answer["seconds"])
                    losses[name].append(answer["loss"])
                print(name, answer, flush=True)
        for worker in workers.values():
            worker.communicate()
    return {
        f"steps of rows cut to {cutoff} tokens": {
            "what": f"processor seconds of a step of {ROWS} rows, 8-bit base, fp32 compute, 1 thread; medians of pairs",
            "commit_before": old,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "said": said,
            "seconds": {name: round(statistics.median(found), 2) for name, found in seconds.items()},
            "ratio": round(statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)), 2),
            "all_seconds": seconds,
            "losses": losses,
        }
    }


def _asked(worker: subprocess.Popen[str], line: str = "") -> Any:
    """Return the next answer of a process, to a line that it is given."""
    assert worker.stdin and worker.stdout
    worker.stdin.write(line)
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--cutoff", type=int, default=128)
    parser.add_argument("--part", choices=["gradient", "precisions", "steps"])
    parser.add_argument("--only", nargs="*", default=[], help="precisions by a part of their names")
    parser.add_argument("--old", help="the commit before")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)

    from lora_alpaca.data.examples import Example

    raw = json.loads(Path(asked.serve).read_text()) if asked.serve else encoded(asked.data, asked.cutoff)
    rows = [Example(np.array(ids), [(first, last) for first, last in spans]) for ids, spans in raw]
    if asked.serve:
        serve(rows)
        return
    if asked.part == "gradient":
        figures = gradient(rows)
    elif asked.part == "precisions":
        figures = precisions(rows, asked.only)
    else:
        figures = steps(asked.old, json.dumps(raw), rows, asked.pairs, asked.cutoff)

    from results_file import RESULTS, write

    file = RESULTS / f"real_model-{datetime.datetime.now(datetime.UTC).date().isoformat()}.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    if "packs" in figures:
        figures["packs"] = known.get("packs", {}) | figures["packs"]
    figures["commands"] = known.get("commands", {}) | {
        asked.part: f"python benchmarks/real_model.py --data ROWS.json --part {asked.part}"
    }
    write("real_model", {"model": "SmolLM2-135M-Instruct", "rows": len(rows), **known, **figures})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
