"""What a forward pass is fed: the base class of packs, and padded rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lora_alpaca.data.examples import Example, label_positions


@dataclass
class Batch:
    """Rows for one forward pass, and the T predictions among its outputs that have a label.

    Rows may share a prediction. `row_index` and `prediction_index` are pairs: which row makes which prediction.
    """

    input_ids: torch.Tensor
    indices: torch.Tensor  # [T]  of the outputs, flattened, that make a prediction
    labels: torch.Tensor  # [T]  the token id that should come next
    weights: torch.Tensor  # [T]  the number of rows that make this prediction
    row_index: torch.Tensor  # [pairs]  into `rows`
    prediction_index: torch.Tensor  # [pairs]  into the T predictions
    rows: list[int]  # the numbers of the rows among the examples that the batch was made from

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model."""
        raise NotImplementedError

    def places(self) -> list[slice]:
        """Return where each row is among the inputs, flattened. Raises ValueError where rows share inputs."""
        raise NotImplementedError

    def sum_by_row(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the sum of the losses [T] of each row, as [rows]; a shared prediction counts in all its rows."""
        row, prediction = self.row_index.to(losses.device), self.prediction_index.to(losses.device)
        return losses.new_zeros(len(self.rows)).index_add(0, row, losses[prediction])


@dataclass
class PaddedBatch(Batch):
    """Rows [rows, longest], filled up on the right."""

    attention_mask: torch.Tensor

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of the model."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def places(self) -> list[slice]:
        """Return where each row is among the inputs, flattened, without what fills it up."""
        longest = self.input_ids.shape[1]
        return [slice(row * longest, row * longest + tokens) for row, tokens in enumerate(self._lengths())]

    def _lengths(self) -> list[int]:
        lengths: list[int] = self.attention_mask.sum(1).tolist()
        return lengths


def pad(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> PaddedBatch:
    """Return some examples as a batch, filled up with `pad_id` to the longest.

    The mask comes from the lengths and the labels from the spans: whatever `pad_id` is, even the end token's, it
    neither hides nor adds a label.
    """
    lengths = np.array([len(example.ids) for example in examples])
    longest = int(lengths.max())
    mask = np.arange(longest) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate([example.ids for example in examples])
    row, position = label_positions(examples)
    return PaddedBatch(
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
        indices=torch.from_numpy(row * longest + position - 1).to(device),
        labels=torch.from_numpy(ids[row, position]).to(device),
        weights=torch.ones(len(row), device=device),
        row_index=torch.from_numpy(row),
        prediction_index=torch.arange(len(row)),
        rows=list(range(len(examples))),
    )


def micro_batches(rows: Sequence[int], micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return this rank's rows of a step in micro-batches; ranks take turns, so that none has more than one row more."""
    own = rows[rank::world_size]
    return [list(own[start : start + micro_batch_size]) for start in range(0, len(own), micro_batch_size)]
