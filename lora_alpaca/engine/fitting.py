"""Makes a model ready to train: our layers replace its own, and rows are packed where that changes no gradient.

    with fitted(model, plan, spec, pad_id, train, world.autocast) as (engine, notes):
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
    Precision,
    difference,
    loss_and_gradient,
    sample,
)
from lora_alpaca.errors import ModelError
from lora_alpaca.models.device import DeviceSpec


@dataclass(kw_only=True)
class EngineChoices:
    """What a plan chooses for the engine: `auto` packs where the comparison allows it."""

    engine: Literal["auto", "packed", "padded"] = "auto"
    token_budget: int = 2048  # the most tokens of a pack
    micro_batch_size: int  # rows of a padded batch
    share_prefix: bool = True  # whether rows of a pack share their beginnings
    compiled: bool = False  # whether the pointwise functions are compiled


@contextmanager
def fitted(
    model: Any,
    choices: EngineChoices,
    spec: DeviceSpec,
    pad_id: int,
    examples: Sequence[Example],
    precision: Precision,
    is_proven: bool = False,
) -> Iterator[tuple[Engine, list[str]]]:
    """Yield the engine of a model, and notes about it; when the context ends, the model is as it was before.

    Packs that are proven, by the run that is resumed, are not compared again. Raises ModelError where packs were asked
    for and the model cannot take them.
    """
    begun, notes = time.perf_counter(), []
    if spec.device.type == "cpu":
        keep_large_buffers()
    base = model.get_base_model()
    functions = pointwise.Pointwise()
    if choices.compiled:
        functions, reason = pointwise.compiled(spec.device, spec.dtype)
        if reason:
            notes.append(f"torch.compile fails here ({reason}); going on without it, only slower")
    was_training = model.training
    model.eval()  # layers and packs are compared without dropout
    with ExitStack() as patched:
        with precision():  # layers are compared in the precision of the run
            patched.enter_context(patches.patched(base, spec.dtype, functions))
            piece_loss = functions.piece_loss if patches.has_plain_head(base) else None
        engine: Engine = Padded(model, spec.device, piece_loss, choices.micro_batch_size, pad_id)
        if choices.engine != "padded":
            packed = Packed(model, spec.device, piece_loss, choices.token_budget, choices.share_prefix)
            alone = Padded(model, spec.device, None, 1, pad_id)
            rows = [] if is_proven else sample(examples)
            if not (reason := _try_packs(patched, packed, alone, rows, precision, spec.dtype)):
                engine = packed
            elif choices.engine == "packed":
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
