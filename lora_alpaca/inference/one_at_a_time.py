"""One answer after another, by `generate` of transformers: beam searches, and models that the scheduler cannot run."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lora_alpaca.inference import workers
from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.sampling import Constraint, Request, Sampling, Token
from lora_alpaca.inference.scoring import score
from lora_alpaca.inference.token_generator import Channel, TokenStream


class OneAtATime:
    """The token generator that answers one prompt after another.

    Every answer is made by a thread of its own, which never waits for its reader: the tokens wait in a queue. After
    every token it offers the model to whoever else takes turns with it, but to no other thread of this generator.
    """

    def __init__(self, adapters: Adapters, pad_id: int | None = None, turns: workers.Turns | None = None):
        self.adapters, self.pad_id = adapters, pad_id
        self._turns, self._queue = turns or workers.Turns(), workers.Turns()
        self._closed = threading.Event()

    def generate(self, request: Request) -> TokenStream:
        return self._begun(lambda channel: self._answer(request, channel))

    def score(self, request: Request) -> TokenStream:
        def work(channel: Channel) -> None:
            with self._queue, self._turns, self.adapters.using(request.adapter) as model:
                self._require_open()
                channel.put(score(model, request.prompt_ids, request.sampling.logprobs or 0))

        return self._begun(work)

    def _begun(self, work: Callable[[Channel], None]) -> TokenStream:
        """Return a stream of what a thread puts into a channel."""
        self._require_open()
        channel = Channel()

        def run() -> None:
            try:
                work(channel)
                channel.end()
            except BaseException as error:  # handed to the reader, who raises it
                channel.end(error)

        workers.start(run)
        return TokenStream(channel)

    def close(self) -> None:
        self._closed.set()

    def _answer(self, request: Request, channel: Channel) -> None:
        """Make an answer when the model is free, unless nobody waits for it any more."""
        watcher = _Watcher(channel, request.sampling, self._closed, lambda: self._let_others(request.adapter))
        with self._queue, self._turns:
            if channel.left.is_set() or workers.leaving.is_set():
                return
            answer = self._generate(request, watcher)
        if request.sampling.num_beams > 1:
            channel.put([Token(number) for number in answer])

    def _generate(self, request: Request, watcher: "_Watcher") -> list[int]:
        """Return the new ids. Called with the turn at the model."""
        self._require_open()
        sampling = request.sampling
        with torch.inference_mode(), self.adapters.using(request.adapter) as model, ExitStack() as entered:
            ids = torch.tensor([list(request.prompt_ids)], device=model.device)
            processors = LogitsProcessorList([watcher.scores] if sampling.logprobs is not None else [])
            if sampling.repetition_penalty != 1:  # the option of `generate` would come before the log-probabilities
                processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
            if request.constraint is not None:
                processors.append(_Allowed(request.constraint, len(request.prompt_ids)))
            processors.append(_Penalties(sampling, len(request.prompt_ids)))
            criteria = StoppingCriteriaList([watcher])
            if sampling.seed is not None:
                processors.append(_Enter(entered, _PrivateDraws(sampling.seed, model.device)))
                criteria.append(_Leave(entered))
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pad_token_id=self.pad_id,
                eos_token_id=list(request.stop_ids) or None,
                logits_processor=processors,
                stopping_criteria=criteria,
                **_options(sampling),
            )
        self._require_open()
        answer: list[int] = output[0, len(request.prompt_ids) :].tolist()
        return answer

    def _let_others(self, adapter: str) -> None:
        """Let whoever waits for the model have a turn, and put this answer's adapter to work again."""
        if self._turns.wanted:
            self._turns.offer()
            with self.adapters.using(adapter):
                pass

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("the token generator is closed")


def _options(sampling: Sampling) -> dict[str, Any]:
    """Return the keyword arguments for `generate`; every one of them has an effect."""
    sampled = {
        "temperature": float(sampling.temperature),
        "top_p": float(sampling.top_p),
        "top_k": sampling.top_k,
        "min_p": float(sampling.min_p) or None,
    }
    unsampled = dict.fromkeys(sampled)  # None: nothing of the model's own generation config slips in
    chosen = sampled if sampling.temperature > 0 else unsampled
    return {
        "do_sample": sampling.temperature > 0,
        "num_beams": sampling.num_beams,
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": None,
        **chosen,
    }


class _Watcher(StoppingCriteria):
    """Called by `generate` after every token: passes it on, and stops an answer that nobody reads."""

    def __init__(self, channel: Channel, sampling: Sampling, closed: threading.Event, let_others: Callable[[], None]):
        self.channel, self.closed, self.let_others = channel, closed, let_others
        self.shows = sampling.num_beams == 1
        self.scores = _Logprobs(sampling.logprobs or 0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.channel.put([self.scores.token(int(input_ids[0, -1]))] if self.shows else [])
        self.let_others()
        stops = self.channel.left.is_set() or self.closed.is_set() or workers.leaving.is_set()
        return torch.full((input_ids.shape[0],), stops, device=input_ids.device, dtype=torch.bool)


class _Logprobs(LogitsProcessor):
    """Called by `generate` before anything changes the scores: keeps the model's own log-probabilities."""

    def __init__(self, top: int):
        self.top = top
        self.last: torch.Tensor | None = None  # [vocabulary]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.last = scores[0].float().log_softmax(-1)
        return scores

    def token(self, number: int) -> Token:
        """Return a token that was chosen by these scores."""
        if self.last is None:
            return Token(number)
        likeliest = self.last.topk(self.top) if self.top else None
        top = () if likeliest is None else zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        return Token(number, float(self.last[number]), tuple(top))


class _Allowed(LogitsProcessor):
    """Called by `generate` before a token is chosen: leaves what a constraint allows."""

    def __init__(self, constraint: Constraint, prompt: int):
        self.constraint, self.seen = constraint, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token in input_ids[0, self.seen :].tolist():
            self.constraint.accept(token)
        self.seen = input_ids.shape[1]
        return scores.masked_fill(~self.constraint.allowed().to(scores.device), float("-inf"))


class _Penalties(LogitsProcessor):
    """Called by `generate` before a token is chosen: OpenAI's penalties on the tokens of the answer, and its bias."""

    def __init__(self, sampling: Sampling, prompt: int):
        self.sampling, self.prompt = sampling, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        asked = self.sampling
        if not (asked.presence_penalty or asked.frequency_penalty or asked.logit_bias):
            return scores
        scores = scores.clone()
        for row, made in zip(scores, input_ids[:, self.prompt :], strict=True):
            ids, counts = made.unique(return_counts=True)
            row[ids] -= asked.presence_penalty + asked.frequency_penalty * counts
            for number, bias in asked.logit_bias.items():
                row[number] += bias
        return scores


class _PrivateDraws(TorchFunctionMode):
    """A context in which this thread draws tokens from a random generator of its own.

    torch's generator is one for the whole process: what other threads draw would change the answer. The numbers drawn
    are those that follow `torch.manual_seed`. Every call of torch costs more in this context, so it is entered after
    the model has computed its scores, and left when the token is chosen.
    """

    def __init__(self, seed: int, device: torch.device):
        super().__init__()
        self.generator = torch.Generator(device).manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        private = {"generator": self.generator} if func is torch.multinomial else {}
        return func(*args, **(kwargs or {}), **private)


class _Enter(LogitsProcessor):
    """Called by `generate` before a token is chosen: enters a context."""

    def __init__(self, entered: ExitStack, context: AbstractContextManager[Any]):
        self.entered, self.context = entered, context

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.entered.enter_context(self.context)
        return scores


class _Leave(StoppingCriteria):
    """Called by `generate` after a token is chosen: leaves the context."""

    def __init__(self, entered: ExitStack):
        self.entered = entered

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.entered.close()
        return torch.zeros(input_ids.shape[0], device=input_ids.device, dtype=torch.bool)
