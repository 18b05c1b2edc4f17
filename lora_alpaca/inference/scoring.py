"""How likely a model finds a text: the log-probability of every token of a prompt, behind those before it."""

from collections.abc import Sequence
from typing import Any

import torch

from lora_alpaca.inference.sampling import Token

CHUNK = 256  # positions whose scores, [CHUNK, vocabulary] in fp32, are held at a time


@torch.inference_mode()
def score(model: Any, ids: Sequence[int], top: int) -> list[Token]:
    """Return the tokens behind the first one, with log-probabilities and the `top` likeliest ones at their places."""
    row = torch.tensor([list(ids)], device=model.device)
    tokens: list[Token] = []
    cache = None
    for start in range(0, len(ids) - 1, CHUNK):
        part = row[:, start : start + CHUNK]
        output = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        following = row[0, start + 1 : start + CHUNK + 1]
        known = output.logits[0, : len(following)].float().log_softmax(-1)
        chosen = known.gather(1, following[:, None])[:, 0].tolist()
        likeliest = known.topk(top) if top else None
        for place, (number, logprob) in enumerate(zip(following.tolist(), chosen, strict=True)):
            pairs: Any = () if likeliest is None else zip(*(one[place].tolist() for one in likeliest), strict=True)
            tokens.append(Token(number, logprob, tuple((index, value) for value, index in pairs)))
    return tokens
