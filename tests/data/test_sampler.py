import pytest

from lora_alpaca.data.sampler import rows_of_step, steps_per_epoch
from lora_alpaca.engine.batches import micro_batches

LENGTHS = [(n * 37) % 91 + 1 for n in range(103)]


@pytest.mark.parametrize("by_length", [False, True])
def test_an_epoch_sees_every_row_once_and_the_next_in_another_order(by_length):
    steps = steps_per_epoch(len(LENGTHS), 8)
    epochs = [
        [row for step in range(start, start + steps) for row in rows_of_step(step, LENGTHS, 8, 42, by_length)]
        for start in (0, steps)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1]


def test_the_order_comes_from_the_seed():
    """Upstream shuffles without a seed, differently on every rank."""
    assert rows_of_step(3, LENGTHS, 8, seed=1) == rows_of_step(3, LENGTHS, 8, seed=1)
    assert rows_of_step(3, LENGTHS, 8, seed=1) != rows_of_step(3, LENGTHS, 8, seed=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_ranks_share_out_exactly_the_rows_of_the_step(world_size, micro_batch_size):
    rows = rows_of_step(0, LENGTHS, 13, 42)
    parts = [micro_batches(rows, micro_batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(row for rank in parts for batch in rank for row in batch) == sorted(rows)
    sizes = [sum(map(len, rank)) for rank in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(batch) <= micro_batch_size for rank in parts for batch in rank)


def test_group_by_length_pads_less():
    def padding(by_length):
        batches = [rows_of_step(step, LENGTHS, 8, 42, by_length) for step in range(steps_per_epoch(len(LENGTHS), 8))]
        return sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in batches) - sum(LENGTHS)

    assert padding(True) < padding(False) / 2
