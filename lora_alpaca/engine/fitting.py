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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.engine import patches, pointwise
from lora_alpaca.engine.allocator import keep_large_buffers, return_large_buffers
from lora_alpaca.engine.engines import Engine, Packed, Padded
from lora_alpaca.engine.equivalence import (
    LossAndGradient,
    Precision,
    compare,
    compare_slice,
    cost_of_padding,
    loss_and_gradient,
    sample,
)
from lora_alpaca.engine.learning import require_learning
from lora_alpaca.engine.model_access import ModelAccess, WholeModel
from lora_alpaca.engine.reference import Reference
from lora_alpaca.errors import ModelError
from lora_alpaca.models import memory
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.layers import library_model


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
    access: ModelAccess | None = None,
) -> Iterator[tuple[Engine, list[str]]]:
    """Yield the engine of a model, and notes about it; when the context ends, the model is as it was before.

    What is proven, by the run that is resumed, is not compared again. Without `access`, this rank holds the model
    whole. Raises ModelError where packs were asked for and the model cannot take them, and for modules of the adapter
    that cannot learn.
    """
    begun, notes = time.perf_counter(), []
    access = access or WholeModel()
    if spec.device.type == "cpu":
        return_large_buffers() if access.in_lockstep else keep_large_buffers()
    base = library_model(model)
    functions = pointwise.Pointwise()
    if choices.compiled:
        functions, reason = pointwise.compiled(spec.device, spec.dtype)
        if reason:
            notes.append(f"torch.compile fails here ({reason}); going on without it, only slower")
    was_training = model.training
    model.eval()  # layers and packs are compared without dropout
    alone = Reference(model, spec.device, None, 1, pad_id, access=access)
    packed = Packed(model, spec.device, None, choices.token_budget, choices.share_prefix, access=access)
    rows = [] if is_proven else sample(examples)
    reason, said = "", list[str]()
    if choices.engine != "padded":
        reason, said = _compare_slice(packed, alone, rows, spec.dtype)  # before our layers are in the model
    with ExitStack() as patched:
        with precision():  # layers are compared in the precision of the run
            patched.enter_context(patches.patched(base, spec.dtype, functions, access))
            piece_loss = functions.piece_loss if patches.has_plain_head(base, access) else None
        padded = Padded(model, spec.device, piece_loss, choices.micro_batch_size, pad_id, access=access)
        expected = _expected(alone, replace(padded, micro_batch_size=1), rows, precision)
        engine: Engine = padded
        if choices.engine != "padded":
            packed = replace(packed, piece_loss=piece_loss)
            if not (reason := reason or _try_packs(patched, packed, alone, rows, expected, precision, spec.dtype)):
                engine = packed
                notes += said
            elif choices.engine == "packed":
                raise ModelError(f"--engine packed: this model cannot take packs: {reason}; leave the flag out")
            else:
                cost = f"{cost_of_padding(packed, padded, examples):.1f} times the tokens, and as much slower"
                notes.append(f"this model cannot take packs: {reason}; padded rows are {cost}")
        if rows and base is not model:  # of a base that learns itself, what no row reaches stays as it was
            notes += require_learning(engine, examples, expected[1], precision)
        notes.append(f"engine: {engine}, ready in {time.perf_counter() - begun:.1f} s")
        model.train(was_training)
        yield engine, notes


def _compare_slice(
    packed: Packed, alone: Reference, rows: Sequence[Example], dtype: torch.dtype
) -> tuple[str, list[str]]:
    """Return the reason against packs that a slice of a run in 16 bits gives in fp32, or an empty text; and notes.

    What packs need and the model has not, comes out when all of it is compared.
    """
    if not rows or dtype == torch.float32:
        return "", []
    try:
        comparison = compare_slice(packed, alone, rows)
        return "" if comparison.passed else str(comparison), []
    except Exception as error:  # models fail in many ways with arguments that they do not know
        return "", [f"packs are compared in 16 bits only, where small faults do not show: {_first_line(error)}"]


def _expected(alone: Reference, padded: Padded, rows: Sequence[Example], precision: Precision) -> LossAndGradient:
    """Return the loss and gradient of rows alone; with our loss, which holds less, where memory is short."""
    try:
        return loss_and_gradient(alone, rows, precision)
    except Exception as error:
        if alone.access.in_lockstep:  # another rank, which had enough, waits in a pass that this one gave up
            raise
        memory.shortage(error)  # raises what is no shortage
    memory.release(alone.device)
    return loss_and_gradient(padded, rows, precision)


def _try_packs(
    patched: ExitStack,
    packed: Packed,
    alone: Reference,
    rows: Sequence[Example],
    expected: LossAndGradient,
    precision: Precision,
    dtype: torch.dtype,
) -> str:
    """Let the model attend in packs until `patched` is unwound, if that leaves the gradients of rows as they are.

    `expected` are those of the rows alone. Return an empty text, or the reason against packs. Without rows nothing is
    compared.
    """
    try:
        together = partial(loss_and_gradient, replace(alone, micro_batch_size=max(1, len(rows))), rows, precision)
        with ExitStack() as attempt:
            attempt.enter_context(patches.packed_attention(library_model(packed.model)))
            if rows:
                comparison = compare(packed, expected, together, rows, dtype == torch.float32, precision)
                if not comparison.passed:
                    return str(comparison)
            patched.push(attempt.pop_all())
            return ""
    except Exception as error:
        return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
