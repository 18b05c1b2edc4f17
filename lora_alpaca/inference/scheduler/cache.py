"""Keys and values of many answers: a row of memory for each, grown as it is needed, in every layer of the model.

Shapes: G key and value heads, D head size.
"""

from collections.abc import Sequence

import torch

Saved = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [G, tokens, D] of every layer
BLOCK = 128  # tokens


class Cache:
    """Rows of keys and values, [rows, G, length, D] in every layer. The first forward makes the layers."""

    def __init__(self) -> None:
        self.rows, self.length = 0, 0
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes that a token takes in all layers; 0 before the first forward."""
        return sum(t.shape[1] * t.shape[3] * t.element_size() for layer in self.layers.values() for t in layer)

    def reserve(self, rows: int, length: int, most_rows: int, most_length: int) -> None:
        """Make place for rows of a length: for twice as much as is needed now, up to what may ever be needed."""
        if rows <= self.rows and length <= self.length:
            return
        rows = max(rows, min(2 * rows, most_rows))
        length = -(-max(length, min(2 * length, most_length)) // BLOCK) * BLOCK
        try:
            for number, (keys, values) in self.layers.items():  # one after another: two copies of a layer, not of all
                self.layers[number] = (_resized(keys, rows, length), _resized(values, rows, length))
        finally:  # memory may have run out half-way
            self.rows = min((keys.shape[0] for keys, _ in self.layers.values()), default=rows)
            self.length = min((keys.shape[2] for keys, _ in self.layers.values()), default=length)

    def write(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values [1, G, N, D] of N tokens into their rows, and return all those of the layer."""
        if layer not in self.layers:
            self.layers[layer] = (
                key.new_zeros(self.rows, key.shape[1], self.length, key.shape[3]),
                value.new_zeros(self.rows, value.shape[1], self.length, value.shape[3]),
            )
        keys, values = self.layers[layer]
        keys[rows, :, positions] = key[0].transpose(0, 1)
        values[rows, :, positions] = value[0].transpose(0, 1)
        return keys, values

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one row to another."""
        for pair in self.layers.values():
            for tensor in pair:
                tensor[target, :, :tokens] = tensor[source, :, :tokens]

    def clear(self, row: int) -> None:
        """Forget a row that holds what is no number: zero times such a one is none either."""
        for pair in self.layers.values():
            for tensor in pair:
                tensor[row] = 0

    def save(self, row: int, tokens: int) -> Saved:
        """Return a copy of the first tokens of a row."""
        return [
            (keys[row, :, :tokens].clone(), values[row, :, :tokens].clone()) for keys, values in self.layers.values()
        ]

    def load(self, row: int, saved: Saved, tokens: int) -> None:
        """Put the first tokens of what was saved into a row."""
        for pair, kept in zip(self.layers.values(), saved, strict=True):
            for tensor, old in zip(pair, kept, strict=True):
                tensor[row, :, :tokens] = old[:, :tokens]

    def release(self) -> None:
        """Give the memory back."""
        self.rows, self.length = 0, 0
        self.layers = {}


def _resized(old: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    new = old.new_zeros(rows, old.shape[1], length, old.shape[3])  # zeros, since 0 times whatever was there may be NaN
    rows, length = min(rows, old.shape[0]), min(length, old.shape[2])
    new[:rows, :, :length] = old[:rows, :, :length]
    return new


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return number
    return min(len(first), len(second))
