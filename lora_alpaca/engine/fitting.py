"""Makes a model ready to train: our layers replace its own, and rows are packed where that changes no gradient.

    with fitted(model, plan, spec, pad_id, train, world.autocast) as (engine, notes):
        for batch in engine.batches(rows):
            engine.loss(batch).backward()

Rows are packed where a comparison finds that a row in a pack has the loss and gradients that it has alone; otherwise
they are padded. What lacks memory there would lack it in a step: packs are then made smaller. PEFT's adapter, its
names and its files do not change.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.engine import allocator, block_attention, patches, pointwise
from lora_alpaca.engine.engines import LEAST_BUDGET, Engine, Packed, Padded
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
from lora_alpaca.engine.packing import length_multiple
from lora_alpaca.engine.recomputation import recomputed_in_evaluation
from lora_alpaca.engine.reference import Reference
from lora_alpaca.errors import ModelError, first_line
from lora_alpaca.models import cards, memory
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
        allocator.bound_kernel_caches()
        allocator.return_large_buffers() if access.in_lockstep else allocator.keep_large_buffers()
    base = library_model(model)
    functions = pointwise.Pointwise()
    if choices.compiled:
        functions, reason = pointwise.compiled(spec.device, spec.dtype)
        if reason:
            notes.append(f"torch.compile fails here ({reason}); going on without it, only slower")
    was_training = model.training
    model.eval()  # layers and packs are compared without dropout
    alone = Reference(model, spec.device, None, 1, pad_id, access=access)
    multiple = length_multiple(spec.device, spec.dtype)
    packed = Packed(model, spec.device, None, choices.token_budget, choices.share_prefix, multiple, access=access)
    rows = [] if is_proven else sample(examples)
    reason, said = "", list[str]()
    with ExitStack() as patched, ExitStack() as comparing:
        comparing.enter_context(recomputed_in_evaluation(base))  # or more memory would be needed than in a step
        comparing.enter_context(cards.fp32_products(in_tf32=False))
        if choices.engine != "padded":
            if spec.device.type == "cuda":
                dtypes = dict.fromkeys([spec.dtype, *([torch.float32] if rows else [])])
                notes += block_attention.choose_kernels(base.config, dtypes, spec.device)
            reason, said = _compare_slice(packed, alone, rows, spec.dtype)  # before our layers are in the model
            allocator.trim()  # it may have needed more than a step, whose buffers would lie beside what it leaves
        with precision():  # layers are compared in the precision of the run
            notes += patched.enter_context(patches.patched(base, spec.dtype, functions, access))
            piece_loss = functions.piece_loss if patches.has_plain_head(base, access) else None
        padded = Padded(model, spec.device, piece_loss, choices.micro_batch_size, pad_id, access=access)
        expected = _expected(alone, replace(padded, micro_batch_size=1), rows, precision)
        engine: Engine = padded
        if choices.engine != "padded":
            packed = replace(packed, piece_loss=piece_loss)
            is_second = spec.dtype != torch.float32 and not said
            check = Check(alone, rows, expected, precision, spec.dtype, is_second)
            if not (reason := access.agreed(reason)):
                packed, reason, shortage = _try_packs(patched, packed, check)
                said += shortage
            if not reason:
                engine = packed
                notes += said
            elif choices.engine == "packed":
                raise ModelError(f"--engine packed: this model cannot take packs: {reason}; leave the flag out")
            else:
                cost = f"{cost_of_padding(packed, padded, examples):.1f} times the tokens, and as much slower"
                notes.append(f"this model cannot take packs: {reason}; padded rows are {cost}")
        if rows and base is not model:  # of a base that learns itself, what no row reaches stays as it was
            notes += require_learning(engine, examples, expected[1], precision)
        if rows:
            memory.release(spec.device)  # of what the comparison took, a step takes pieces of other sizes
            allocator.trim()
        comparing.close()
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
        return "", [f"packs are compared in 16 bits only, where small faults do not show: {first_line(error)}"]


def _expected(alone: Reference, padded: Padded, rows: Sequence[Example], precision: Precision) -> LossAndGradient:
    """Return the loss and gradient of rows alone; with our loss, which holds less, where memory is short."""
    try:
        return loss_and_gradient(alone, rows, precision)
    except Exception as error:
        _shortage(alone, error)
    memory.release(alone.device)
    return loss_and_gradient(padded, rows, precision)


@dataclass(frozen=True)
class Check:
    """What packs are compared with: some rows alone, whose loss and gradient are expected. Without rows, nothing."""

    alone: Reference
    rows: Sequence[Example]
    expected: LossAndGradient
    precision: Precision
    dtype: torch.dtype
    is_second: bool  # a slice of the model has been compared in fp32 before

    def again(self) -> LossAndGradient:
        """Return the loss and gradient of the rows, computed in another right way; as before for want of memory."""
        try:
            return loss_and_gradient(replace(self.alone, micro_batch_size=len(self.rows)), self.rows, self.precision)
        except Exception as error:
            _shortage(self.alone, error)
        memory.release(self.alone.device)
        return self.expected


def _try_packs(patched: ExitStack, packed: Packed, check: Check) -> tuple[Packed, str, list[str]]:
    """Let the model attend in packs until `patched` is unwound, if that leaves the gradients of rows as they are.

    Return packs that memory holds, an empty text or the reason against packs, the same on all ranks, and notes.
    """
    notes: list[str] = []
    while True:
        reason, short = "", ""
        with ExitStack() as attempt:
            try:
                attempt.enter_context(patches.packed_attention(library_model(packed.model)))
                reason = _against(packed, check) if check.rows else ""
            except Exception as error:
                if not (short := _shortage(packed, error, others=True)):
                    reason = first_line(error)
            if not (short := packed.access.agreed(short)):
                if not (reason := packed.access.agreed(reason)):
                    patched.push(attempt.pop_all())
                return packed, reason, notes
        memory.release(packed.device)
        smaller = _smaller(packed, check.rows)
        notes.append(f"out of memory with {packed} ({short}): going on with {smaller}; the batch stays as it is")
        packed = smaller


def _against(packed: Packed, check: Check) -> str:
    """Return what speaks against packs: gradients that differ, or what only training needs, such as dropout."""
    comparison = compare(
        packed, check.expected, check.again, check.rows, check.dtype, check.precision, is_second=check.is_second
    )
    if not comparison.passed:
        return str(comparison)
    shortest = min(check.rows, key=lambda row: len(row.ids))
    cards = [packed.device] if packed.device.type == "cuda" else []
    with torch.random.fork_rng(cards), torch.no_grad(), check.precision():
        packed.model.train()
        try:
            for batch in packed.batches([shortest]):
                packed.losses(batch)
        finally:
            packed.model.eval()
    return ""


def _smaller(packed: Packed, rows: Sequence[Example]) -> Packed:
    """Return packs of half of what memory did not hold. Raises ModelError where they cannot be smaller."""
    held = min(packed.token_budget, sum(len(row.ids) for row in rows))
    if held <= LEAST_BUDGET:
        raise ModelError(
            f"out of memory with a pack of {held} tokens; {memory.describe_free(packed.device)}; lower --cutoff_len, "
            "or say --gradient_checkpointing True"
        )
    return replace(packed, token_budget=held // 2)


def _shortage(engine: Engine, error: Exception, others: bool = False) -> str:
    """Return what an error says of too little memory. Any other is raised again, or is an empty text with `others`.

    Raised again, too, where ranks compute in lockstep: those that had enough wait in a pass that this one gave up.
    """
    try:
        text = memory.shortage(error)
    except Exception:
        if others:
            return ""
        raise
    if engine.access.in_lockstep:
        raise error
    return text
