"""Which rows make an optimizer step, which rank takes which of them, and how a micro-batch is padded.

The order is a function of seed and epoch alone: a step has the same rows on one device and on eight, whatever the
micro-batch, and a resumed run needs only its step number to find its place.
"""

from collections.abc import Sequence

import torch

from lora_alpaca.data.examples import IGNORED, Example

Batch = dict[str, torch.Tensor]


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
