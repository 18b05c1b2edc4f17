"""Whether the scheduler computes what a model computes: asked of the model itself, before it answers."""

from typing import Any, NamedTuple

import torch

from lora_alpaca.inference.scheduler.attention import NAME, PLAIN, Span, Step
from lora_alpaca.inference.scheduler.cache import Cache

TOLERANCE = {torch.float32: 1e-3}  # of the largest difference between two logits of a token
SIXTEEN_BITS = 0.05  # a leak between two answers is ten times that
LAYERS = ("full_attention", "sliding_attention")  # the kinds that are computed


class Verdict(NamedTuple):
    """Why a model cannot be scheduled, or "", and how many bytes a token takes in the cache."""

    reason: str
    bytes_per_token: int


def check(model: Any) -> Verdict:
    """Return whether a model gives the same logits in steps as alone. The model is left ready for steps, or as it was.

    Two texts are read in a step, one of them in two parts, and get two tokens each, as answers do.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()
    if not inner._can_set_attn_implementation():
        return Verdict("its attention cannot be replaced", 0)
    if getattr(config, "_attn_implementation", None) not in (PLAIN, NAME):
        return Verdict(f"its attention is {getattr(config, '_attn_implementation', None)}", 0)
    if odd := sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYERS)):
        return Verdict(f"it has layers of {', '.join(odd)}", 0)
    try:
        inner.set_attn_implementation(NAME)
        reason, size = _compare(model, config)
    except Exception as error:
        reason, size = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200], 0
    if reason:
        inner.set_attn_implementation(PLAIN)
    return Verdict(reason, size)


@torch.inference_mode()
def _compare(model: Any, config: Any) -> tuple[str, int]:
    """Return why the logits differ, or "", and the bytes of a token in the cache."""
    numbers = torch.Generator().manual_seed(0)
    both = torch.randint(model.get_input_embeddings().weight.shape[0], (2, 14), generator=numbers)
    expected, texts = model(input_ids=both.to(model.device), use_cache=False).logits, both.tolist()
    cache = Cache()
    cache.reserve(2, 16, 2, 16)
    steps = [  # of each text, from where to where
        ([], [(0, 0, 7), (1, 0, 5)]),
        ([(0, 7)], [(1, 5, 12)]),
        ([(0, 8), (1, 12)], []),
    ]
    worst = 0.0
    for singles, parts in steps:
        places = [(row, position, position + 1) for row, position in singles] + parts
        ids = [token for row, start, stop in places for token in texts[row][start:stop]]
        rows = [row for row, start, stop in places for _ in range(start, stop)]
        positions = [position for _, start, stop in places for position in range(start, stop)]
        spans = [Span(row, start, stop, rows.index(row)) for row, start, stop in parts]
        step = Step(cache, ids, rows, positions, spans).to(model.device)
        keep = torch.arange(len(ids), device=model.device)
        logits = model(**step.inputs(), logits_to_keep=keep).logits[0]
        reference = torch.stack([expected[row][position] for row, position in zip(rows, positions, strict=True)])
        error = (logits.float() - reference.float()).abs().amax(-1)
        spread = reference.float().amax(-1) - reference.float().amin(-1)
        worst = max(worst, float((error / spread.clamp(min=1e-6)).nan_to_num(float("inf")).max()))
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and step.windows == {None}:
        return f"its attention does not tell its window of {window} tokens", 0
    limit = TOLERANCE.get(model.dtype, SIXTEEN_BITS)  # logits may be fp32 though the layers are not
    if worst > limit:
        return f"its logits would differ by {worst:.2g} of their range", 0
    return "", cache.bytes_per_token
