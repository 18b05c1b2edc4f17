"""Checks of what is written: adapters, resumed runs, merged models, and bases that are held in 8 or 4 bits."""

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.engine.equivalence import EXACT
from lora_alpaca.errors import AdapterError, ModelError
from lora_alpaca.models import quantization
from lora_alpaca.models.base import load_base, locate_base, without_report
from lora_alpaca.models.lora import WEIGHTS
from lora_alpaca.models.weights import load_tensors
from lora_alpaca.selftest import judge
from lora_alpaca.selftest.bench import Bench
from lora_alpaca.selftest.finding import Finding, NotApplicable

ROUNDED_LOSS = 0.03  # of a loss, in 16 bits
ONCE_ROUNDED = 1e-5  # of the largest logit: what rounding the merged weights to fp32 once may change
VISIBLE = 1e-3  # of the largest logit: an adapter that changes less would hide what is sought


def saved(bench: Bench) -> Finding:
    """The validation loss that a run reports, against that of the adapter in its folder."""
    reported = bench.trained.validation_loss
    assert reported is not None
    expected, _ = judge.loss_and_gradient(judge.load(bench.base, bench.trained.output_dir), bench.held_out)
    return Finding(abs(reported - expected) / expected, EXACT if bench.is_exact else ROUNDED_LOSS)


def resume(bench: Bench) -> Finding:
    """A run from the checkpoint in the middle of another one, against that one."""
    whole = _adapter(bench.trained.output_dir)
    middle = bench.trained.output_dir / "checkpoint-2"
    differing = _differing(_adapter(bench.run("resumed", resume_from_checkpoint=str(middle)).output_dir), whole)
    if differing and bench.spec.device.type != "cpu":  # do the kernels of this device repeat themselves?
        again = _differing(_adapter(bench.run("again").output_dir), whole)
        if again:
            raise NotApplicable("the kernels of this device do not repeat a run to the bit, resumed or not")
    return Finding(differing, 0)


def merge(bench: Bench) -> Finding:
    """The exported model against base + adapter, both by plain transformers, the latter with PEFT."""
    rows = bench.held_out
    model = judge.load(bench.base, bench.trained.output_dir)
    tuned = judge.logits(model, rows)
    with model.disable_adapter():
        effect = _distance(judge.logits(model, rows), tuned)
    if not effect > VISIBLE:
        raise AdapterError(f"the adapter of the run changes the logits by {effect:.1e} only: it has learned nothing")
    del model
    merged = judge.logits(judge.load(locate_base(str(bench.merged))), rows)
    return Finding(_distance(merged, tuned), ONCE_ROUNDED, f"the adapter itself changes {effect:.2f}")


def quantised_save(bench: Bench) -> Finding:
    """The weights of the base in 8 and in 4 bits: as loaded, after use, and in what is saved then."""
    if bench.spec.device.type == "mps":
        raise NotApplicable("bitsandbytes does not quantise on mps")
    try:
        quantization.require_bitsandbytes(8)
    except ModelError as error:
        raise NotApplicable(str(error)) from None
    differing = sum(_changed(bench, bits) for bits in (8, 4))
    return Finding(differing, 0)


@torch.no_grad()
def _changed(bench: Bench, bits: int) -> int:
    """Return how many layers have other weights after use, or where they are saved, than when they were loaded."""
    spec, folder = replace(bench.spec, bits=bits), bench.folder / f"{bits}-bit"
    model, _ = load_base(bench.base, spec)
    before = _dequantised(model)
    ids = torch.tensor(bench.examples[0].ids.tolist(), device=spec.device)[None]
    model(input_ids=ids, use_cache=False)
    used = _dequantised(model)
    with without_report(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers reads what it has renamed
        model.save_pretrained(folder)
    stored = _dequantised(load_base(locate_base(str(folder)), replace(spec, kind="stored"))[0])
    return _differing(used, before) + _differing(stored, before)


def _dequantised(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the quantised layers, as they compute."""
    found = {}
    for name, module in model.named_modules():
        if (eight := quantization.eight_bit_weight(module)) is not None:
            found[name] = eight[0].float() * eight[1][:, None]
        elif (four := quantization.four_bit_weight(module)) is not None:
            found[name] = four.clone()
    return found


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / WEIGHTS, AdapterError)


def _differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> int:
    """Return how many tensors are not the same to the bit, or are missing."""
    names = found.keys() | expected.keys()
    return sum(
        name not in found or name not in expected or not torch.equal(found[name], expected[name]) for name in names
    )


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, as a part of the largest value; infinite for other shapes, and for NaN."""
    if found.shape != expected.shape:
        return math.inf
    distance = ((found - expected).abs().max() / expected.abs().max()).item()
    return math.inf if math.isnan(distance) else distance
