"""The table of checks, and how one is made: what it measures, the most that may be, and what came out."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_alpaca.errors import LoraAlpacaError
from lora_alpaca.selftest import gradients, prompts, weights
from lora_alpaca.selftest.bench import Bench
from lora_alpaca.selftest.finding import Finding, NotApplicable

Status = Literal["ok", "failed", "left out"]


class Check(NamedTuple):
    """A check: what has to hold, what is measured, and the function that measures it."""

    promise: str
    measures: str
    measure: Callable[[Bench], Finding]


_GRADIENT = "error of the gradient that the optimizer gets, relative to plain transformers and PEFT in fp64"

CHECKS = {
    "labels": Check("what is learned is the answer and its end", "rows where it is not", prompts.labels),
    "end_token": Check(
        "the token that ends an answer is learned, and ends answers", "rows where it is not", prompts.end_token
    ),
    "packing": Check("rows in one pack are rows alone", _GRADIENT, gradients.packing),
    "accumulation": Check("several passes are one", _GRADIENT, gradients.accumulation),
    "chunked_loss": Check(
        "the loss in chunks is the plain loss", "error of loss and gradient, relative to fp64", gradients.chunked_loss
    ),
    "saved": Check(
        "the adapter that is saved is the one that was validated",
        "error of the validation loss, relative to the saved adapter's by PEFT in fp64",
        weights.saved,
    ),
    "resume": Check("a resumed run is the uninterrupted one", "adapter tensors that differ by a bit", weights.resume),
    "merge": Check(
        "the merged model is base + adapter", "largest difference of logits, of the largest logit", weights.merge
    ),
    "template": Check(
        "training, generation and the exported chat template prompt alike", "prompts that differ", prompts.template
    ),
    "quantised_save": Check(
        "using and saving a quantised base leaves its weights", "layers that differ by a bit", weights.quantised_save
    ),
    "ranks": Check("two processes are one", _GRADIENT, gradients.ranks),
    "sharding": Check("a sharded base is a whole one", _GRADIENT, gradients.sharding),
}


@dataclass(frozen=True)
class Result:
    """What became of a check. Nothing is measured where it was left out, or failed with an error; `note` says why."""

    name: str
    status: Status
    measured: float | None
    limit: float | None
    note: str
    seconds: float


def make(name: str, bench: Bench) -> Result:
    """Return what becomes of a check; whatever is raised, by a library too, fails it."""
    began = time.perf_counter()

    def result(status: Status, note: str, measured: float | None = None, limit: float | None = None) -> Result:
        return Result(name, status, measured, limit, note, time.perf_counter() - began)

    try:
        found = CHECKS[name].measure(bench)
    except NotApplicable as reason:
        return result("left out", str(reason))
    except LoraAlpacaError as error:
        return result("failed", str(error))
    except Exception as error:  # an installed library may raise anything, and that is what is sought
        return result("failed", " ".join([f"{type(error).__name__}:", *str(error).split()])[:300])
    return result("ok" if found.passed else "failed", found.note, found.measured, found.limit)
