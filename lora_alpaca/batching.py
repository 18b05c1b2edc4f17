"""Which rows make an optimizer step, which rank takes which of them, and how a micro-batch is padded.

The order is a function of seed and epoch alone: a step has the same rows on one device and on eight, whatever the
micro-batch, and a resumed run needs only its step number to find its place.
"""

import math
import random
from collections.abc import Sequence
from functools import lru_cache

import torch

from lora_alpaca.examples import IGNORED, Example

Batch = dict[str, torch.Tensor]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the optimizer steps that see every row once; the last may be smaller."""
    return math.ceil(rows / batch_size)


def rows_of_step(step: int, lengths: Sequence[int], batch_size: int, seed: int, by_length: bool = False) -> list[int]:
    """Return the row numbers of optimizer step `step`, counted from 0 over all epochs."""
    epoch, place = divmod(step, steps_per_epoch(len(lengths), batch_size))
    order = _order_of_epoch(epoch, tuple(lengths), batch_size, seed, by_length)
    return order[place * batch_size : (place + 1) * batch_size]


@lru_cache(maxsize=1)  # asked for at every step, and drawn once an epoch
def _order_of_epoch(epoch: int, lengths: tuple[int, ...], batch_size: int, seed: int, by_length: bool) -> list[int]:
    """Return all row numbers in the order of an epoch.

    With `by_length` rows are sorted by length inside windows of 50 batches, and the batches shuffled again.
    """
    draw = random.Random(f"{seed}/{epoch}")  # a text is hashed with sha512: unrelated streams for neighbouring seeds
    order = list(range(len(lengths)))
    draw.shuffle(order)
    if by_length:
        window = 50 * batch_size
        windows = [order[start : start + window] for start in range(0, len(order), window)]
        order = [row for rows in windows for row in sorted(rows, key=lambda row: lengths[row], reverse=True)]
        full = len(order) // batch_size * batch_size
        batches = [order[start : start + batch_size] for start in range(0, full, batch_size)]
        draw.shuffle(batches)
        order = [row for batch in batches for row in batch] + order[full:]
    return order


def micro_batches(rows: Sequence[int], micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return this rank's rows of a step in micro-batches; ranks take turns, so that none has more than one row more."""
    own = rows[rank::world_size]
    return [list(own[start : start + micro_batch_size]) for start in range(0, len(own), micro_batch_size)]


def pad(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Return `input_ids`, `attention_mask` and `labels`, each int64 [rows, longest], padded on the right.

    The mask comes from the lengths and the labels from the examples: whatever `pad_id` is, even the end token's,
    it neither hides nor adds a label.
    """
    longest = max(len(example.input_ids) for example in examples)

    def filled(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    return {
        "input_ids": filled([example.input_ids for example in examples], pad_id),
        "attention_mask": filled([[1] * len(example.input_ids) for example in examples], 0),
        "labels": filled([example.labels for example in examples], IGNORED),
    }
