"""Which rows make an optimizer step. The order is a function of seed and epoch alone."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache


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
