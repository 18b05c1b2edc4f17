"""Stage 2: rows in packs are rows alone, in every precision."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from gpu_stages.models import autocast, examples, made
from gpu_stages.stage import SHAPES, Stage
from lora_alpaca.engine import EngineChoices, fitted
from lora_alpaca.engine.equivalence import difference, loss_and_gradient
from lora_alpaca.engine.reference import Reference
from lora_alpaca.models.device import DeviceSpec, has_bf16


def run(stage: Stage) -> None:
    """How far rows in packs are off rows alone, by our own check, for every base and dtype; then the tests of cards."""
    where, found = torch.device(stage.device), {}
    dtypes = [torch.float32, *([torch.bfloat16] if has_bf16(where) else []), torch.float16][: 2 if stage.tiny else 3]
    for bits in (8, 4, 16):
        for dtype in dtypes:
            kind = f"{bits} bits, {str(dtype).removeprefix('torch.')}"
            try:
                model, rows = made(stage, SHAPES["tiny"], bits, dtype), examples(SHAPES["tiny"])
                spec = DeviceSpec(where, dtype, bits)
                choices = EngineChoices(engine="packed", token_budget=2048, micro_batch_size=2)
                precision = autocast(stage, dtype)
                with fitted(model, choices, spec, 0, rows, precision) as (engine, notes):
                    model.eval()
                    alone = loss_and_gradient(Reference(model, where, None, 1, 0), rows, precision)
                    off = difference(loss_and_gradient(engine, rows, precision), alone)
                found[kind] = {"off": off, "notes": [note for note in notes if not note.startswith("engine:")]}
            except Exception as error:  # every kind is told
                found[kind] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            stage.tell(kinds=found)
    failed = [kind for kind, figures in found.items() if "failed" in figures]
    tests = Path(__file__).parents[2] / "tests"
    if stage.device == "cuda" and tests.is_dir() and importlib.util.find_spec("pytest"):
        words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(tests)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tests.parent)
        lines = done.stdout.splitlines()
        stage.tell(tests=lines[-1:], failing=[line for line in lines if line.startswith("FAILED")][:20])
    if failed:
        raise RuntimeError(f"{', '.join(failed)}: {found[failed[0]]['failed']}")
