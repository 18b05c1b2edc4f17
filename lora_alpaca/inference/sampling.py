"""How an answer is sampled, and what a request for one holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from lora_alpaca.errors import ConfigError

BASE = "base"  # the name of the model without an adapter
MOST_BEAMS, MOST_LOGPROBS, MOST_STOPS = 16, 20, 16

_RANGES: dict[str, tuple[float, float, bool]] = {  # lowest, highest, and whether the lowest is allowed
    "temperature": (0, 10, True),
    "top_p": (0, 1, False),
    "top_k": (0, math.inf, True),
    "min_p": (0, 1, True),
    "repetition_penalty": (0, 10, False),
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
    "num_beams": (1, MOST_BEAMS, True),
    "logprobs": (0, MOST_LOGPROBS, True),
    "seed": (0, 2**63 - 1, True),
}
_WHOLE = ("top_k", "num_beams", "max_new_tokens", "logprobs", "seed")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 always takes the likeliest; then top p, top k and min p have no effect.

    `max_new_tokens` None is all that the context has left. `stop` are texts that end the answer and are not part of it.
    `logprobs` is how many of the likeliest tokens are told at each step, and None that no log-probability is. Raises
    ConfigError for a value out of its range.
    """

    temperature: float = 0.1
    top_p: float = 0.75
    top_k: int = 40
    num_beams: int = 1
    max_new_tokens: int | None = 128
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high, closed) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            if not _is_number(value, name) or not (low <= value <= high) or (value == low and not closed):
                above = "from" if closed else "above"
                limit = "" if high == math.inf else f" to {high:g}"
                raise ConfigError(f"{name} {value!r}: a number {above} {low:g}{limit} is needed")
        if self.max_new_tokens is not None and (
            not _is_number(self.max_new_tokens, "max_new_tokens") or self.max_new_tokens < 1
        ):
            raise ConfigError(f"max_new_tokens {self.max_new_tokens!r}: a whole number from 1 is needed")
        if not all(isinstance(text, str) and text for text in self.stop) or len(self.stop) > MOST_STOPS:
            raise ConfigError(f"stop {list(self.stop)!r:.200}: up to {MOST_STOPS} texts, none empty, are needed")
        if self.num_beams > 1 and self.logprobs is not None:
            raise ConfigError(f"num_beams {self.num_beams}: a beam search has no log-probabilities of its tokens")


def _is_number(value: object, name: str) -> bool:
    kinds = (int,) if name in _WHOLE else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


class Token(NamedTuple):
    """A token of an answer. Its log-probability, in nats, is the model's own, before temperature and penalties.

    It and `top`, the likeliest (id, log-probability) pairs, are there if they were asked for.
    """

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What may come next in an answer, as of a grammar. It belongs to one request."""

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [vocabulary]."""
        ...

    def accept(self, token: int) -> None:
        """Take note of the token that came."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt for the model: its ids, how to answer, the ids that end the answer, and the adapter by name."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    stop_ids: Sequence[int] = ()
    adapter: str = BASE
    constraint: Constraint | None = None
