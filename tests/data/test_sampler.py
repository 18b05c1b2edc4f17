import random

import numpy as np
import pytest

from lora_alpaca.data.sampler import Sampler
from lora_alpaca.engine.batches import micro_batches

LENGTHS = np.array([(n * 37) % 91 + 1 for n in range(103)])


@pytest.mark.parametrize("by_length", [False, True])
def test_an_epoch_sees_every_row_once_and_the_next_in_another_order(by_length):
    sampler = Sampler(LENGTHS, 8, 42, by_length)
    steps = sampler.steps_per_epoch
    epochs = [[row for step in range(start, start + steps) for row in sampler.rows(step)] for start in (0, steps)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1]


def test_the_order_comes_from_the_seed():
    """Upstream shuffles without a seed, differently on every rank."""
    assert Sampler(LENGTHS, 8, seed=1).rows(3) == Sampler(LENGTHS, 8, seed=1).rows(3)
    assert Sampler(LENGTHS, 8, seed=1).rows(3) != Sampler(LENGTHS, 8, seed=2).rows(3)


def order_by_lists(lengths, batch_size, seed, epoch, by_length):
    """Return the order of an epoch, computed row by row."""
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    if by_length:
        windows = [order[start : start + 50 * batch_size] for start in range(0, len(order), 50 * batch_size)]
        order = [row for rows in windows for row in sorted(rows, key=lambda row: lengths[row], reverse=True)]
        full = len(order) // batch_size * batch_size
        batches = [order[start : start + batch_size] for start in range(0, full, batch_size)]
        draw.shuffle(batches)
        order = [row for batch in batches for row in batch] + order[full:]
    return order


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("rows", "batch_size"), [(1, 1), (5, 8), (103, 8), (103, 1), (1000, 13)])
def test_the_order_is_that_of_plain_lists(rows, batch_size, by_length):
    """A run that is resumed by another version takes the same rows: the order never changes."""
    lengths = np.array([(n * 37) % 11 + 1 for n in range(rows)])  # many are equal, which keep the order of the draw
    sampler = Sampler(lengths, batch_size, 7, by_length)
    for epoch in (2, 0, 1):
        first = epoch * sampler.steps_per_epoch
        found = [row for step in range(first, first + sampler.steps_per_epoch) for row in sampler.rows(step)]
        assert found == order_by_lists(lengths.tolist(), batch_size, 7, epoch, by_length)


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_ranks_share_out_exactly_the_rows_of_the_step(world_size, micro_batch_size):
    rows = Sampler(LENGTHS, 13, 42).rows(0)
    parts = [micro_batches(rows, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(row for rank in parts for batch in rank for row in batch) == sorted(rows)
    sizes = [sum(map(len, rank)) for rank in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(batch) <= micro_batch_size for rank in parts for batch in rank)


def test_group_by_length_pads_less():
    def padding(by_length):
        sampler = Sampler(LENGTHS, 8, 42, by_length)
        batches = [sampler.rows(step) for step in range(sampler.steps_per_epoch)]
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches) - sum(LENGTHS)

    assert padding(True) < padding(False) / 2
