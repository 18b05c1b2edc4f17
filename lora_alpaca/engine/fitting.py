"""Makes a model ready to train: our layers replace its own, and rows are packed where that changes no gradient.

    with fitted(model, settings, train, lengths, world.autocast) as (engine, notes):
        for batch in engine.batches(rows):
            engine.loss(batch).backward()

Rows are packed where a comparison finds that a row in a pack has the loss and gradients that it has alone; otherwise
they are padded. PEFT's adapter, its names and its files do not change.
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
from lora_alpaca.engine.engines import Engine, Packed, Padded
from lora_alpaca.engine.equivalence import (
    ROUNDED,
    TOLERANCES,
    Lengths,
    Precision,
    difference,
    loss_and_gradient,
    sample,
)
from lora_alpaca.errors import ModelError


@dataclass(frozen=True)
class Settings:
    """What was chosen: `auto` packs where the comparison allows it; `compiled` compiles the pointwise functions."""

    engine: Literal["auto", "packed", "padded"]
    device: torch.device
    dtype: torch.dtype
    token_budget: int
    share_prefix: bool
    micro_batch_size: int
    pad_id: int
    compiled: bool = False
    checked: bool = False  # the run that is resumed has compared


@contextmanager
def fitted(
    model: Any, settings: Settings, examples: Sequence[Example], lengths: Lengths, precision: Precision
) -> Iterator[tuple[Engine, list[str]]]:
    """Yield the engine of a model, and notes about it; when the context ends, the model is as it was before.

    Raises ModelError where packs were asked for and the model cannot take them.
    """
    begun, notes = time.perf_counter(), []
    if settings.device.type == "cpu":
        keep_large_buffers()
    base = model.get_base_model()
    functions = pointwise.Pointwise()
    if settings.compiled:
        functions, reason = pointwise.compiled(settings.device, settings.dtype)
        if reason:
            notes.append(f"torch.compile fails here ({reason}); going on without it, only slower")
    was_training = model.training
    model.eval()  # layers and packs are compared without dropout
    with ExitStack() as patched:
        with precision():  # layers are compared in the precision of the run
            patched.enter_context(patches.patched(base, settings.dtype, functions))
            piece_loss = functions.piece_loss if patches.has_plain_head(base) else None
        engine: Engine = Padded(model, settings.device, piece_loss, settings.micro_batch_size, settings.pad_id)
        if settings.engine != "padded":
            packed = Packed(model, settings.device, piece_loss, settings.token_budget, settings.share_prefix)
            alone = Padded(model, settings.device, None, 1, settings.pad_id)
            rows = [] if settings.checked else sample(examples, lengths)
            if not (reason := _try_packs(patched, packed, alone, rows, precision, settings.dtype)):
                engine = packed
            elif settings.engine == "packed":
                raise ModelError(f"--engine packed: this model cannot take packs: {reason}; leave the flag out")
            else:
                notes.append(f"this model cannot take packs: {reason}")
        notes.append(f"engine: {engine}, ready in {time.perf_counter() - begun:.1f} s")
        model.train(was_training)
        yield engine, notes


def _try_packs(
    patched: ExitStack,
    packed: Engine,
    alone: Engine,
    rows: Sequence[Example],
    precision: Precision,
    dtype: torch.dtype,
) -> str:
    """Let the model attend in packs until `patched` is unwound, if that leaves the gradients of rows as they are.

    Return an empty text, or the reason against packs. Without rows nothing is compared.
    """
    try:
        expected = loss_and_gradient(alone, rows, precision)
        with ExitStack() as attempt:
            attempt.enter_context(patches.packed_attention(packed.model.get_base_model()))
            error = difference(loss_and_gradient(packed, rows, precision), expected) if rows else 0.0
            if error <= TOLERANCES.get(dtype, ROUNDED):
                patched.push(attempt.pop_all())
                return ""
            return f"the gradient of a row in a pack is {error:.1%} off that of the row alone"
    except Exception as error:  # models fail in many ways with arguments that they do not know
        return (str(error).splitlines() or [type(error).__name__])[0]
