"""The two ways from examples to losses: packs, and padded rows. Only outputs that have a label reach the head.

Both give the same losses and the same gradients; a pack has no padding in it, and holds what rows share once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.engine.batches import Batch, micro_batches, pad
from lora_alpaca.engine.loss import ChunkedCrossEntropy, PieceLoss, cross_entropy
from lora_alpaca.engine.packing import pack, packs

LEAST_BUDGET = 64  # tokens; packs of less hold single rows anyway


@dataclass(frozen=True)
class Engine:
    """A model's forward pass from a batch to its losses. `piece_loss` is None where its head is not only a product."""

    model: Any  # with a PEFT adapter
    device: torch.device
    piece_loss: PieceLoss | None
    name: ClassVar[Literal["packed", "padded"]]

    @property
    def batch_size(self) -> int:
        """Return the size of a batch: the token budget of a pack, or the rows of a padded micro-batch."""
        raise NotImplementedError

    def batches(self, examples: Sequence[Example], rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield a rank's share of some examples, on the device."""
        raise NotImplementedError

    def smaller(self) -> "Engine | None":
        """Return this engine with batches of half the size, or None where they cannot be smaller."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of a batch, summed over its labels, as an fp32 scalar."""
        return (self.losses(batch) * batch.weights).sum()

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of every prediction of a batch, fp32 [T]; `batch.sum_by_row` sums it by row."""
        if self.piece_loss is None:
            logits = self.model(**batch.inputs(), use_cache=False).logits.flatten(0, 1)  # [tokens, V]
            return cross_entropy(logits.index_select(0, batch.indices), batch.labels)
        model = self.model.get_base_model()
        hidden = model.base_model(**batch.inputs(), use_cache=False)[0].flatten(0, 1)  # [tokens, W]
        head = model.get_output_embeddings().weight  # [V, W]
        predicting = hidden.index_select(0, batch.indices).to(head.dtype)  # [T, W]
        losses: torch.Tensor = ChunkedCrossEntropy.apply(predicting, head, batch.labels, self.piece_loss)
        return losses


@dataclass(frozen=True)
class Packed(Engine):
    """Rows in packs of at most `token_budget` tokens."""

    token_budget: int
    share_prefix: bool
    name: ClassVar[Literal["packed", "padded"]] = "packed"

    def __str__(self) -> str:
        shared = "" if self.share_prefix else ", beginnings not shared"
        return f"packs of {self.token_budget} tokens{shared}"

    @property
    def batch_size(self) -> int:
        """Return the token budget of a pack."""
        return self.token_budget

    def smaller(self) -> "Packed | None":
        """Return this engine with half the token budget; a single row is a pack however small that is."""
        return replace(self, token_budget=self.token_budget // 2) if self.token_budget > LEAST_BUDGET else None

    def batches(self, examples: Sequence[Example], rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield every `world_size`-th pack of the examples."""
        for rows in packs(examples, self.token_budget, self.share_prefix)[rank::world_size]:
            yield replace(pack([examples[row] for row in rows], self.share_prefix, self.device), rows=rows)


@dataclass(frozen=True)
class Padded(Engine):
    """Rows in micro-batches, filled up to the longest with `pad_id`."""

    micro_batch_size: int
    pad_id: int
    name: ClassVar[Literal["packed", "padded"]] = "padded"

    def __str__(self) -> str:
        return f"padded micro-batches of {self.micro_batch_size} rows"

    @property
    def batch_size(self) -> int:
        """Return the rows of a micro-batch."""
        return self.micro_batch_size

    def smaller(self) -> "Padded | None":
        """Return this engine with micro-batches of half the size."""
        return replace(self, micro_batch_size=self.micro_batch_size // 2) if self.micro_batch_size > 1 else None

    def batches(self, examples: Sequence[Example], rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield a rank's rows, every `world_size`-th, as micro-batches."""
        for rows in micro_batches(range(len(examples)), self.micro_batch_size, rank, world_size):
            yield replace(pad([examples[row] for row in rows], self.pad_id, self.device), rows=rows)
