"""NEFTune: noise on the embeddings of the rows that are trained on (arXiv:2310.05914).

Validation and the check of the engine at start are computed without it.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.engine.batches import Batch
from lora_alpaca.models.layers import library_model


class EmbeddingNoise:
    """Uniform noise between -s and s, s = alpha / sqrt(L d): L tokens of the row, whole, and d entries of an embedding.

    The noise of a row follows from a seed and the place of the row in its step: it is the same in packs and padded
    rows, in batches of any size, on any number of ranks, and in a run that resumes.
    """

    def __init__(self, model: Any, alpha: float):
        self._embedding, self._alpha = library_model(model).get_input_embeddings(), alpha

    @contextmanager
    def added(self, batch: Batch, examples: Sequence[Example], seed: str) -> Iterator[None]:
        """Within this context, a forward pass of a batch, made from these examples, has noise on its embeddings."""

        def with_noise(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            noise = torch.zeros_like(embedded).flatten(0, 1)
            for row, place in zip(batch.rows, batch.places(), strict=True):
                drawn = self._draw(f"{seed} {row}", len(examples[row].ids), noise)
                noise[place] = drawn[: place.stop - place.start].to(noise.dtype)
            return embedded + noise.view_as(embedded)

        hook = self._embedding.register_forward_hook(with_noise)
        try:
            yield
        finally:
            hook.remove()

    def _draw(self, seed: str, tokens: int, like: torch.Tensor) -> torch.Tensor:
        """Return the noise of a row, fp32 [tokens, d], on the device of a tensor [*, d]."""
        generator = torch.Generator(like.device)
        generator.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7]))
        width, scale = like.shape[-1], self._alpha / math.sqrt(tokens * like.shape[-1])
        drawn = torch.rand(tokens, width, generator=generator, device=like.device)  # all: a part would be drawn anew
        return drawn.mul_(2 * scale).sub_(scale)
