"""Attention of a step: every token sees the keys of its own answer, in the cache.

The model passes the keyword `step` to every attention layer; a call without it is ordinary attention. The query heads
that share a key head become rows of one query, so that no key is copied.

Shapes: N tokens, H query heads, G key and value heads, R = H / G, D head size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_alpaca.inference.scheduler.cache import Cache

NAME = "scheduled"
PLAIN = "sdpa"  # what a call without a step gets, and what a model must have had before
REFUSED = ("softcap", "s_aux", "position_bias")  # options of attention that are not computed here


class Span(NamedTuple):
    """Neighbouring tokens of one answer in a step: the row, their positions, and the place of the first in the step."""

    row: int
    start: int
    stop: int
    first: int


class Step:
    """The tokens of a forward: one each of the answers in rows 0 to `singles`, then the spans of other rows.

    The first `answering` tokens, guesses among them, are of answers under way, and those behind them of prompts.
    """

    def __init__(
        self, cache: Cache, ids: list[int], rows: list[int], positions: list[int], spans: list[Span], guesses: int = 0
    ):
        self.cache, self.spans = cache, spans
        self.ids, self.rows, self.positions = torch.tensor([ids, rows, positions]).unbind()  # [N] each
        self.singles = len(ids) - sum(span.stop - span.start for span in spans)
        self.answering = self.singles + guesses
        self.longest = 1 + max(positions[: self.singles], default=-1)
        self.windows: set[int | None] = set()  # that the layers asked for
        self._masks: dict[tuple[int, int | None, torch.dtype], Any] = {}

    def to(self, device: torch.device) -> "Step":
        """Put the tensors on a device."""
        self.ids, self.rows, self.positions = (t.to(device) for t in (self.ids, self.rows, self.positions))
        return self

    def parts(self) -> tuple["Step", "Step"]:
        """Return the tokens of answers under way, and those of prompts, as steps of their own."""
        ids, rows, positions = self.ids.tolist(), self.rows.tolist(), self.positions.tolist()
        at, guesses = self.answering, self.answering - self.singles
        guessed = [span for span in self.spans if span.first < at]
        prompts = [span._replace(first=span.first - at) for span in self.spans if span.first >= at]
        answers = Step(self.cache, ids[:at], rows[:at], positions[:at], guessed, guesses)
        others = Step(self.cache, ids[at:], rows[at:], positions[at:], prompts)
        return answers.to(self.ids.device), others.to(self.ids.device)

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of the model."""
        return {
            "input_ids": self.ids[None],
            "position_ids": self.positions[None],
            "attention_mask": torch.empty(1, 1, 0, 0, device=self.ids.device),  # so that the model makes none
            "use_cache": False,
            "step": self,
        }

    def singles_mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """Return what is added to the scores [singles, 1, 1, longest]; None where all is seen."""
        key = (-1, window, like.dtype)
        if key not in self._masks:
            places = torch.arange(self.longest, device=like.device)
            last = self.positions[: self.singles, None]
            hidden = places > last
            if window is not None:
                hidden |= places <= last - window
            needed = self.singles > 1 or (window is not None and window < self.longest)
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
            self._masks[key] = mask[:, None, None] if needed else None
        found: torch.Tensor | None = self._masks[key]
        return found

    def span_mask(self, number: int, repeats: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """Return what is added to the scores of a span, [R * own, stop]: causal, and within the window."""
        key = (number, window, like.dtype)
        if key not in self._masks:
            span = self.spans[number]
            places = torch.arange(span.stop, device=like.device)
            own = places[span.start :, None]
            hidden = places > own
            if window is not None:
                hidden |= places <= own - window
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
            self._masks[key] = mask.repeat(repeats, 1)
        found: torch.Tensor = self._masks[key]
        return found


def scheduled_attention(
    module: Any,  # the attention layer
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,  # [1, G, N, D]
    value: torch.Tensor,  # [1, G, N, D]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    step: Step | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output [1, N, H, D], and None for the attention weights."""
    if step is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    for name in REFUSED:
        if options.get(name) is not None:
            raise NotImplementedError(f"its attention has {name}")
    window = options.get("sliding_window")
    step.windows.add(window)
    keys, values = step.cache.write(module.layer_idx, key, value, step.rows, step.positions)
    heads, groups, singles = query.shape[1], key.shape[1], step.singles
    repeats = heads // groups
    outputs = []
    if singles:
        q = query[0, :, :singles].unflatten(0, (groups, repeats)).permute(2, 0, 1, 3)  # [singles, G, R, D]
        k, v = keys[:singles, :, : step.longest], values[:singles, :, : step.longest]
        mask = step.singles_mask(window, query)
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scaling).flatten(1, 2))
    for number, span in enumerate(step.spans):
        own = span.stop - span.start
        q = query[:, :, span.first : span.first + own].reshape(1, groups, repeats * own, -1)
        k, v = keys[span.row : span.row + 1, :, : span.stop], values[span.row : span.row + 1, :, : span.stop]
        mask = step.span_mask(number, repeats, window, query)
        output = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling)  # [1, G, R * own, D]
        outputs.append(output.view(heads, own, -1).transpose(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


AttentionInterface.register(NAME, scheduled_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
