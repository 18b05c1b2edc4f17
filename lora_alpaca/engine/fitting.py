"""A model made ready to train: our parts are put into it, and rows are packed where that is proven to change nothing.

    with fitted(model, settings, train, lengths, world.autocast) as (engine, notes):
        for batch in engine.batches(rows):
            engine.loss(batch).backward()

Rows are packed where the check finds that a row in a pack has the loss and gradients that it has alone; otherwise they
are padded. PEFT's adapter, its names and its files stay what they are.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.engine import patches, pointwise
from lora_alpaca.engine.allocator import keep_large_buffers
from lora_alpaca.engine.batches import Engine, Packed, Padded
from lora_alpaca.engine.equivalence import ROUNDED, TOLERANCES, Precision, difference, loss_and_gradient, sample
from lora_alpaca.errors import ModelError


@dataclass(frozen=True)
class Settings:
    """What was chosen: `auto` packs where the check allows it; `compiled` compiles the pointwise parts."""

    engine: Literal["auto", "packed", "padded"]
    device: torch.device
    dtype: torch.dtype
    token_budget: int
    share_prefix: bool
    micro_batch_size: int
    pad_id: int
    compiled: bool = False
    checked: bool = False  # by the run that is resumed


@contextmanager
def fitted(
    model: Any, settings: Settings, examples: Sequence[Example], lengths: Sequence[int], precision: Precision
) -> Iterator[tuple[Engine, list[str]]]:
    """Yield the engine of a model, and what to say about it; the model is as it was found when the context ends.

    Raises ModelError where packs were asked for and the model cannot take them.
    """
    begun, said = time.perf_counter(), []
    if settings.device.type == "cpu":
        keep_large_buffers()
    base = model.get_base_model()
    functions = pointwise.Pointwise()
    if settings.compiled:
        functions, reason = pointwise.compiled(settings.device, settings.dtype)
        if reason:
            said.append(f"torch.compile fails here ({reason}); going on without it, only slower")
    was_training = model.training
    model.eval()  # what is compared is without dropout
    with ExitStack() as put_in:
        with precision():  # for what is probed
            put_in.enter_context(patches.patched(base, settings.dtype, functions))
            score = functions.score if patches.has_plain_head(base) else None
        engine: Engine = Padded(model, settings.device, score, settings.micro_batch_size, settings.pad_id)
        if settings.engine != "padded":
            packed = Packed(model, settings.device, score, settings.token_budget, settings.share_prefix)
            alone = Padded(model, settings.device, None, 1, settings.pad_id)
            rows = [] if settings.checked else sample(examples, lengths)
            if not (reason := _pack(put_in, packed, alone, rows, precision, settings.dtype)):
                engine = packed
            elif settings.engine == "packed":
                raise ModelError(f"--engine packed: this model cannot take packs: {reason}; leave the flag out")
            else:
                said.append(f"this model cannot take packs: {reason}")
        said.append(f"engine: {engine}, ready in {time.perf_counter() - begun:.1f} s")
        model.train(was_training)
        yield engine, said


def _pack(
    put_in: ExitStack,
    packed: Engine,
    alone: Engine,
    rows: Sequence[Example],
    precision: Precision,
    dtype: torch.dtype,
) -> str:
    """Put packed attention in until `put_in` is unwound, if rows in a pack are what they are alone, or return why not.

    Without rows nothing is compared.
    """
    try:
        expected = loss_and_gradient(alone, rows, precision)
        with ExitStack() as attempt:
            attempt.enter_context(patches.packed_attention(packed.model.get_base_model()))
            error = difference(loss_and_gradient(packed, rows, precision), expected) if rows else 0.0
            if error <= TOLERANCES.get(dtype, ROUNDED):
                put_in.push(attempt.pop_all())
                return ""
            return f"the gradient of a row in a pack is {error:.1%} off that of the row alone"
    except Exception as error:  # whatever a model does with what it was not made for
        return (str(error).splitlines() or [type(error).__name__])[0]
