"""The receipt of a merge: proof that the merged model answers as base + adapter does."""

from typing import Any

import torch

from lora_alpaca.data.encoding import Encoder
from lora_alpaca.errors import ExportError
from lora_alpaca.prompts import AnyTemplate, Conversation

PROBES = [
    ("Tell me about alpacas.", ""),
    ("Name the capital of the country.", "Country: Peru"),
    ("Add the numbers.", "2 + 3"),
]
FP32_TOLERANCE = 1e-4  # of the largest logit


def probe_ids(tokenizer: Any, template: AnyTemplate) -> list[torch.Tensor]:
    """Return a few prompts, encoded as in training, int64 [1, T] each."""
    encoder = Encoder.for_prompts(tokenizer, template)
    return [torch.tensor([encoder.prompt(Conversation.of(*probe))]) for probe in PROBES]


@torch.inference_mode()
def logits(model: Any, probes: list[torch.Tensor]) -> torch.Tensor:
    """Return the logits of all probes, fp32 [all tokens, V], on the CPU."""
    return torch.cat([model(input_ids=ids.to(model.device), use_cache=False).logits[0].float().cpu() for ids in probes])


def compare(plain: torch.Tensor, tuned: torch.Tensor, merged: torch.Tensor, exact: bool) -> dict[str, float]:
    """Return the receipt of a merge. Raises ExportError if the merged logits are not those of base + adapter.

    In fp32 the two must agree to 1e-4. In a shorter precision both carry rounding noise, so the merged logits must be
    ten times nearer to base + adapter than to the base, or within the noise.
    """
    error = ((merged - tuned).abs().max() / tuned.abs().max()).item()
    effect = ((tuned - plain).abs().max() / tuned.abs().max()).item()
    allowed = FP32_TOLERANCE if exact else max(0.1 * effect, 0.02)
    if not error <= allowed:
        raise ExportError(
            f"the merged model's logits differ from base + adapter by {error:.1e} of the largest; "
            f"{allowed:.0e} is allowed"
        )
    return {"adapter_effect": effect, "merge_error": error}


def rounding(plain: torch.Tensor, tuned: torch.Tensor, saved: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return the effect of rounding to the saved dtype: its share of the adapter's effect, and the top tokens kept."""
    lost = ((saved - tuned).norm() / (tuned - plain).norm().clamp_min(1e-12)).item()
    same = (saved.argmax(-1) == tuned.argmax(-1)).float().mean().item()
    return {"saved_dtype": str(dtype).removeprefix("torch."), "rounding_share": lost, "same_top_token": same}


def summary(receipt: dict[str, Any]) -> str:
    """Return a receipt in a sentence, and a warning where rounding loses half of what the adapter changes."""
    line = (
        f"merge checked: {receipt['changed_weights']} weights changed; "
        f"logits equal base + adapter to {receipt['merge_error']:.1e}; "
        f"as {receipt['saved_dtype']} the top token is the same at {receipt['same_top_token']:.1%} of the probed places"
    )
    if receipt["rounding_share"] > 0.5:
        line += (
            f"\nwarning: rounding to {receipt['saved_dtype']} is {receipt['rounding_share']:.0%} of what the adapter "
            "changes; "
            "--dtype fp32 keeps it"
        )
    return line
