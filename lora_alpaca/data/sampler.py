"""Which rows make an optimizer step. The order is a function of seed and epoch alone."""

import math
import random

import numpy as np

WINDOW = 50  # batches that are sorted by length together


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the optimizer steps that see every row once; the last may be smaller."""
    return math.ceil(rows / batch_size)


class Sampler:
    """The rows of every optimizer step. The order of an epoch is drawn once, when its first step is asked for.

    With `by_length`, rows are sorted by length inside windows of 50 batches, and the batches shuffled again.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, by_length: bool = False):
        self.lengths, self.batch_size, self.seed, self.by_length = lengths, batch_size, seed, by_length
        self.steps_per_epoch = steps_per_epoch(len(lengths), batch_size)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def rows(self, step: int) -> list[int]:
        """Return the row numbers of an optimizer step, counted from 0 over all epochs."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw(epoch)
        rows: list[int] = self._order[number * self.batch_size : (number + 1) * self.batch_size].tolist()
        return rows

    def _draw(self, epoch: int) -> np.ndarray:
        """Return all row numbers in the order of an epoch."""
        draw = random.Random(f"{self.seed}/{epoch}")  # a text is hashed with sha512: neighbouring seeds are unrelated
        order = _shuffled(len(self.lengths), draw)
        if not self.by_length:
            return order
        window = WINDOW * self.batch_size
        order = np.concatenate([self._longest_first(order[i : i + window]) for i in range(0, len(order), window)])
        full = len(order) // self.batch_size
        batches, rest = np.split(order, [full * self.batch_size])
        return np.concatenate([batches.reshape(full, self.batch_size)[_shuffled(full, draw)].ravel(), rest])

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.lengths[rows], kind="stable")]


def _shuffled(count: int, draw: random.Random) -> np.ndarray:
    """Return the numbers up to `count` in random order."""
    numbers = list(range(count))
    draw.shuffle(numbers)
    return np.array(numbers, np.int64)
