"""What a model answers when it always takes the likeliest token, with the log-probabilities of the next likeliest."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import mean
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lora_alpaca.export.verify.served_receipt import TOP, Continuation


@torch.inference_mode()
def continuations(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Continuation]:
    """Return the greedy continuations of prompts, `new_tokens` long each: no token ends one.

    They are computed in one batch, padded on the left, in the precision of the model. Its own generation config has no
    effect.
    """
    if not prompts:
        return []
    longest = max(map(len, prompts))
    pad = prompts[0][0]  # any token there is: it is masked
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    likeliest = _Likeliest()
    with _plain_generation(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([likeliest]),
        )
    return [
        Continuation(new, [step[row] for step in likeliest.steps])
        for row, new in enumerate(output[:, longest:].tolist())
    ]


@torch.inference_mode()
def logprobs(model: Any, prompts: Sequence[Sequence[int]], found: Sequence[Continuation]) -> list[list[float]]:
    """Return the log-probability that a model gives every token of continuations that may be another model's."""
    scores = []
    for prompt, (ids, _) in zip(prompts, found, strict=True):
        row = torch.tensor([[*prompt, *ids]], device=model.device)
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        scores.append(logits.gather(1, row[0, len(prompt) :, None])[:, 0].tolist())
    return scores


def rounding(model: Any, prompts: Sequence[Sequence[int]], found: Sequence[Continuation]) -> float:
    """Return by how many nats 16 bits change a log-probability of what a model said, on average.

    The outputs of its parts are rounded to bf16, as they are where it computes in that.
    """
    with ExitStack() as undo:
        for part in model.modules():
            if next(part.children(), None) is None:
                undo.callback(part.register_forward_hook(_in_16_bits).remove)
        rounded = logprobs(model, prompts, found)
    return mean(
        abs(score - place[0][1])
        for scores, (_, likeliest) in zip(rounded, found, strict=True)
        for score, place in zip(scores, likeliest, strict=True)
    )


def _in_16_bits(part: torch.nn.Module, inputs: Any, output: Any) -> Any:
    rounds = isinstance(output, torch.Tensor) and output.is_floating_point()
    return output.to(torch.bfloat16).to(output.dtype) if rounds else None


class _Likeliest(LogitsProcessor):
    """Called by `generate` before a token is chosen: keeps the likeliest ones, and not the logits of all."""

    def __init__(self) -> None:
        self.steps: list[list[list[tuple[int, float]]]] = []  # step -> prompt -> (id, log-probability)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found, ids = scores.float().log_softmax(-1).topk(min(TOP, scores.shape[-1]))
        self.steps.append([list(zip(*row, strict=True)) for row in zip(ids.tolist(), found.tolist(), strict=True)])
        return scores


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Within this context, a model has an empty generation config: no end token, no penalties."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = before
