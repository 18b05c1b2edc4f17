"""The two ways from examples to losses: packs, and padded rows. Only outputs that have a label reach the head.

Both give the same losses and the same gradients; a pack has no padding in it, and holds what rows share once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.engine import packing
from lora_alpaca.engine.batches import Batch, micro_batches, pad
from lora_alpaca.engine.loss import PieceLoss, cross_entropy, head_losses
from lora_alpaca.engine.lower_layers import LowerLayers
from lora_alpaca.engine.model_access import ModelAccess, WholeModel, through
from lora_alpaca.engine.packing import pack
from lora_alpaca.engine.transfer import moved, one_ahead, pinned
from lora_alpaca.models.layers import library_model

LEAST_BUDGET = 64  # tokens; packs of less hold single rows anyway


@dataclass(frozen=True)
class Engine:
    """A model's forward pass from a batch to its losses. `piece_loss` is None where its head is not only a product."""

    model: Any  # of transformers, or PEFT's with an adapter
    device: torch.device
    piece_loss: PieceLoss | None
    access: ModelAccess = field(default_factory=WholeModel, kw_only=True)
    body: LowerLayers | None = field(default=None, kw_only=True)  # in place of the model's
    name: ClassVar[Literal["packed", "padded"]]

    @property
    def batch_size(self) -> int:
        """Return the size of a batch: the token budget of a pack, or the rows of a padded micro-batch."""
        raise NotImplementedError

    def batches(self, examples: Sequence[Example], rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield a rank's share of some examples, on the device.

        In lockstep, a rank with fewer batches than another computes a row more, which weighs nothing.
        """
        shares = self.shares(examples, world_size)
        yield from self._on_device(examples, shares[rank])
        if self.access.in_lockstep:
            for _ in range(max(map(len, shares)) - len(shares[rank])):
                idle = self.batch(examples, [min(range(len(examples)), key=lambda row: len(examples[row].ids))])
                none, pairs = torch.zeros_like(idle.weights), idle.row_index[:0]
                yield replace(idle, weights=none, row_index=pairs, prediction_index=pairs)

    def _on_device(self, examples: Sequence[Example], batches: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yield batches of rows, on the device; for a card, the next one is made while it computes one."""
        if self.device.type != "cuda":
            for rows in batches:
                yield self.batch(examples, rows)
            return
        on_host = replace(self, device=torch.device("cpu"))
        with one_ahead(pinned(on_host.batch(examples, rows)) for rows in batches) as made:
            for batch in made:
                yield moved(batch, self.device)

    def shares(self, examples: Sequence[Example], world_size: int) -> list[list[list[int]]]:
        """Return for each rank the rows of each of its batches, by their places among the examples."""
        raise NotImplementedError

    def batch(self, examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        """Return some of the examples as a batch, on the device."""
        raise NotImplementedError

    def smaller(self) -> "Engine | None":
        """Return this engine with batches of half the size, or None where they cannot be smaller."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of a batch, summed over its labels, as an fp32 scalar."""
        return (self.losses(batch) * batch.weights).sum()

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of every prediction of a batch, fp32 [T]; `batch.sum_by_row` sums it by row."""
        return self.access.call(self.compute, batch)

    def compute(self, batch: Batch) -> torch.Tensor:
        """Return the losses, with the weights of the model in reach."""
        if self.piece_loss is None:
            logits = self.model(**batch.inputs(), use_cache=False).logits.flatten(0, 1)  # [tokens, V]
            return cross_entropy(logits.index_select(0, batch.indices), batch.labels)
        model = library_model(self.model)
        body = self.body or model.base_model
        hidden = body(**batch.inputs(), use_cache=False)[0].flatten(0, 1)  # [tokens, W]
        head, piece_loss = model.get_output_embeddings(), self.piece_loss
        predicting = hidden.index_select(0, batch.indices)  # [T, W]
        return through(head, lambda x: head_losses(x, head.weight, batch.labels, piece_loss), predicting)


@dataclass(frozen=True)
class Packed(Engine):
    """Rows in packs of at most `token_budget` tokens."""

    token_budget: int
    share_prefix: bool
    multiple: int = 1  # of which the tokens of a pack are a multiple: a few are added, and cost less than a new shape
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

    def shares(self, examples: Sequence[Example], world_size: int) -> list[list[list[int]]]:
        """Return the packs of each rank, of which all have about as many tokens."""
        return packing.shares(examples, self.token_budget, self.share_prefix, world_size)

    def batch(self, examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        """Return some of the examples as a pack."""
        return replace(
            pack([examples[row] for row in rows], self.share_prefix, self.device, self.multiple), rows=list(rows)
        )


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

    def shares(self, examples: Sequence[Example], world_size: int) -> list[list[list[int]]]:
        """Return each rank's rows, every `world_size`-th, as micro-batches."""
        rows, size = range(len(examples)), self.micro_batch_size
        return [micro_batches(rows, size, rank, world_size) for rank in range(world_size)]

    def batch(self, examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        """Return some of the examples, padded."""
        return replace(pad([examples[row] for row in rows], self.pad_id, self.device), rows=list(rows))
