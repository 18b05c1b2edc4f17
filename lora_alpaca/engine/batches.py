"""The two ways from examples to a loss: packs, and padded rows. Both score only what is to be learned.

Both give the same loss and the same gradients; a pack has no padding in it, and holds what rows share once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from lora_alpaca.data.examples import IGNORED, Example
from lora_alpaca.engine.loss import Score, ScoredCrossEntropy, cross_entropy
from lora_alpaca.engine.packing import pack, packs

LEAST_BUDGET = 64  # tokens; packs of less hold single rows anyway


@dataclass(frozen=True)
class Batch:
    """What the model is called with, and the T predictions to score among its outputs, rows after rows."""

    inputs: dict[str, Any]
    places: torch.Tensor  # [T]
    labels: torch.Tensor  # [T]
    weights: torch.Tensor  # [T]


@dataclass(frozen=True)
class Engine:
    """A model's forward pass from a batch to its loss. `score` is None where its head is more than a product."""

    model: Any  # with a PEFT adapter
    device: torch.device
    score: Score | None
    name: ClassVar[Literal["packed", "padded"]]

    def batches(self, examples: Sequence[Example], rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield a rank's share of some examples, on the device."""
        raise NotImplementedError

    def smaller(self) -> "Engine | None":
        """Return this engine with batches of half the size, or None where that is not to be had."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy of a batch, summed over its labels, as an fp32 scalar."""
        if self.score is None:
            logits = self.model(**batch.inputs, use_cache=False).logits.flatten(0, 1)  # [tokens, V]
            return cross_entropy(logits.index_select(0, batch.places), batch.labels, batch.weights)
        model = self.model.get_base_model()
        hidden = model.base_model(**batch.inputs, use_cache=False)[0].flatten(0, 1)  # [tokens, W]
        head = model.get_output_embeddings().weight  # [V, W]
        scored = hidden.index_select(0, batch.places).to(head.dtype)  # [T, W]
        loss: torch.Tensor = ScoredCrossEntropy.apply(scored, head, batch.labels, batch.weights, self.score)
        return loss


@dataclass(frozen=True)
class Packed(Engine):
    """Rows in packs of at most `token_budget` tokens."""

    token_budget: int
    share_prefix: bool
    name: ClassVar[Literal["packed", "padded"]] = "packed"

    def __str__(self) -> str:
        shared = "" if self.share_prefix else ", beginnings not shared"
        return f"packs of {self.token_budget} tokens{shared}"

    def smaller(self) -> "Packed | None":
        """Return this engine with half the token budget; a single row is a pack however small that is."""
        return replace(self, token_budget=self.token_budget // 2) if self.token_budget > LEAST_BUDGET else None

    def batches(self, examples: Sequence[Example], rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield every `world_size`-th pack of the examples."""
        for rows in packs(examples, self.token_budget, self.share_prefix)[rank::world_size]:
            packed = pack([examples[row] for row in rows], self.share_prefix, self.device)
            inputs = {"input_ids": packed.input_ids, "position_ids": packed.positions, "pack": packed}
            yield Batch(inputs, packed.places, packed.labels, packed.weights)


@dataclass(frozen=True)
class Padded(Engine):
    """Rows in micro-batches, filled up to the longest with `pad_id`."""

    micro_batch_size: int
    pad_id: int
    name: ClassVar[Literal["packed", "padded"]] = "padded"

    def __str__(self) -> str:
        return f"padded micro-batches of {self.micro_batch_size} rows"

    def smaller(self) -> "Padded | None":
        """Return this engine with micro-batches of half the size."""
        return replace(self, micro_batch_size=self.micro_batch_size // 2) if self.micro_batch_size > 1 else None

    def batches(self, examples: Sequence[Example], rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield a rank's rows, every `world_size`-th, as micro-batches."""
        for rows in micro_batches(range(len(examples)), self.micro_batch_size, rank, world_size):
            padded = pad([examples[row] for row in rows], self.pad_id, self.device)
            following = F.pad(padded.pop("labels")[:, 1:], (0, 1), value=IGNORED).flatten()  # the next token's label
            places = (following != IGNORED).nonzero().squeeze(1)
            yield Batch(dict(padded), places, following[places], torch.ones(len(places), device=self.device))


def micro_batches(rows: Sequence[int], micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Return this rank's rows of a step in micro-batches; ranks take turns, so that none has more than one row more."""
    own = rows[rank::world_size]
    return [list(own[start : start + micro_batch_size]) for start in range(0, len(own), micro_batch_size)]


def pad(examples: Sequence[Example], pad_id: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
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
