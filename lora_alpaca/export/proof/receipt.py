"""The receipt of an export: proof that what was written answers as base + adapter does.

All models are computed from files, layer by layer: base + adapter as PEFT computes it, in fp64, which is what the
others are held to; the base; the merged tensors before they are rounded; and what each format holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_alpaca.errors import AdapterError, ExportError
from lora_alpaca.export.proof.samples import Sample

TOLERANCE = 1e-4  # of the largest logit, between merged tensors in fp32 and base + adapter in fp64
FARTHEST = {False: 0.2, True: 2.0}  # KL in nats per token of a format, not quantised or quantised: wrong beyond it
ROUNDING = 2e-6  # of the largest logit, between two ways to compute the same in fp32
ROWS = 64  # of logits that are compared at a time


@dataclass(frozen=True)
class Reference:
    """The logits of base + adapter and of the base alone on samples, fp32 [all tokens, V]."""

    samples: Sequence[Sample]
    tuned: torch.Tensor
    plain: torch.Tensor

    def effect(self) -> float:
        """Return how much the adapter changes. Raises AdapterError if that is nothing."""
        effect = distance(self.plain, self.tuned)
        if not effect > ROUNDING:
            raise AdapterError("the adapter changes no logit of the probes: base + adapter answers as the base does")
        return effect

    def require_equal(self, merged: torch.Tensor) -> float:
        """Return how far the logits of a merge in fp32 are from base + adapter; ExportError beyond the tolerance."""
        error = distance(merged, self.tuned)
        if not error <= TOLERANCE:
            raise ExportError(
                f"the merged model's logits differ from base + adapter by {error:.1e} of the largest; "
                f"{TOLERANCE:.1e} is allowed; nothing is written"
            )
        return error

    def figures(self, found: torch.Tensor) -> dict[str, Any]:
        """Return how a model's logits compare with those of base + adapter.

        `largest_logit_difference` and `mean_logit_difference` are parts of the largest logit; `kl` is the mean
        divergence in nats per token; `same_top_token` a share of all tokens, `greedy_agreement` of those of the
        answers; `share_of_the_adapter` is the difference as a part of what the adapter changes; `loss` is the mean over
        the learned tokens of validation rows, where there are some.
        """
        largest = self.tuned.abs().max().item()
        difference, divergence, same = 0.0, 0.0, []
        for part in range(0, len(found), ROWS):
            ours, theirs = found[part : part + ROWS], self.tuned[part : part + ROWS]
            difference += (ours - theirs).abs().double().sum().item()
            log_p, log_q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
            divergence += (log_p.exp() * (log_p - log_q)).sum().item()
            same.append(ours.argmax(-1) == theirs.argmax(-1))
        agreed = torch.cat(same)
        answered = self._predicting(rows=False)
        result = {
            "largest_logit_difference": distance(found, self.tuned),
            "mean_logit_difference": difference / found.numel() / largest,
            "kl": max(0.0, divergence / len(found)),
            "same_top_token": agreed.float().mean().item(),
            "share_of_the_adapter": ((found - self.tuned).norm() / (self.tuned - self.plain).norm()).item(),
        }
        if answered:
            result["greedy_agreement"] = agreed[[place for place, _ in answered]].float().mean().item()
        if learned := self._predicting(rows=True):
            result |= {"loss": _loss(found, learned), "loss_of_base_and_adapter": _loss(self.tuned, learned)}
        return result

    def require_near(self, found: dict[str, Any], quantised: bool) -> None:
        """Raise ExportError where the figures of a format are no matter of rounding, or of quantising."""
        if not found["kl"] <= FARTHEST[quantised]:
            raise ExportError(
                f"what was written as {found['what']} does not answer as base + adapter: a KL divergence of "
                f"{found['kl']:.1e} nats per token, where {FARTHEST[quantised]} is allowed; nothing is kept"
            )

    def _predicting(self, rows: bool) -> list[tuple[int, int]]:
        """Return the places in the logits that predict an answer, and the ids of that: of rows, or of probes."""
        found, start = [], 0
        for sample in self.samples:
            if sample.is_row == rows:
                found += [(start + place - 1, sample.ids[place]) for place in sample.answer]
            start += len(sample.ids)
        return found


def _loss(logits: torch.Tensor, predicted: Sequence[tuple[int, int]]) -> float:
    places, ids = [place for place, _ in predicted], torch.tensor([token for _, token in predicted])
    return torch.nn.functional.cross_entropy(logits[places].double(), ids).item()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of two tensors, as a part of the largest value that is expected."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
