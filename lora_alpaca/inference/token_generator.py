"""Token ids in, token ids out: the model answers prompts and knows nothing about text."""

import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 always takes the likeliest; then top p and top k have no effect."""

    temperature: float = 0.1
    top_p: float = 0.75
    top_k: int = 40
    num_beams: int = 1
    max_new_tokens: int = 128
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for `generate`; every one of them has an effect."""
        sampled = {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k}
        unsampled = dict.fromkeys(sampled)  # None: nothing of the model's own generation config slips in
        chosen = sampled if self.temperature > 0 else unsampled
        return {
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            **chosen,
        }


class TokenGenerator(Protocol):
    """What answers prompts. Several threads may call it; no reader makes another one wait."""

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generator[list[int], None, None]:
        """Yield the new ids as they are made, the one that stops the answer included.

        An empty list says that a token was made and none is certain yet, as in a beam search. Closing the iterator,
        or dropping it, stops the answer at the next token. Raises what the model raises.
        """
        ...

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """Return the new ids of several prompts, computed together; padding follows the id that stops an answer."""
        ...

    def close(self) -> None:
        """Stop every answer; their readers, and those who ask from now on, get a RuntimeError."""
        ...


class OneAtATime:
    """The token generator that answers one prompt after another, with `generate` of transformers.

    Every answer is made by a thread of its own. The thread holds the model's lock until the answer is complete, and
    never waits for its reader: the ids wait in a queue.
    """

    def __init__(self, model: Any, stop_ids: Sequence[int], pad_id: int):
        self.model, self.stop_ids, self.pad_id = model, list(stop_ids), pad_id
        self._model_lock = threading.Lock()
        self._closed = threading.Event()

    def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generator[list[int], None, None]:
        arrived: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        left = threading.Event()

        def work() -> None:
            try:
                watcher = _Watcher(arrived, left, self._closed, shows=sampling.num_beams == 1)
                with self._model_lock:
                    ids = [] if left.is_set() else self._generate([prompt_ids], sampling, watcher)[0]
                if sampling.num_beams > 1:
                    arrived.put(ids)
                arrived.put(None)
            except BaseException as error:  # handed to the reader, who raises it
                arrived.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (item := arrived.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            left.set()

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        with self._model_lock:
            return self._generate(prompts, sampling, None)

    def close(self) -> None:
        self._closed.set()

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, watcher: StoppingCriteria | None
    ) -> list[list[int]]:
        """Return the new ids of prompts, which are padded on the left. Called with the model's lock held."""
        self._require_open()
        device, longest = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        processors = LogitsProcessorList()
        criteria = StoppingCriteriaList([watcher] if watcher else [])
        with torch.inference_mode(), ExitStack() as entered:
            if sampling.seed is not None:
                processors.append(_Enter(entered, _PrivateDraws(sampling.seed, device)))
                criteria.append(_Leave(entered))
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                pad_token_id=self.pad_id,
                eos_token_id=self.stop_ids or None,
                logits_processor=processors,
                stopping_criteria=criteria,
                **sampling.options(),
            )
        self._require_open()
        return [row[longest:] for row in output.tolist()]

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("the token generator is closed")


class _Watcher(StoppingCriteria):
    """Called by `generate` after every token: passes the new id on, and stops an answer that nobody reads."""

    def __init__(self, arrived: "queue.SimpleQueue[Any]", left: threading.Event, closed: threading.Event, shows: bool):
        self.arrived, self.left, self.closed, self.shows = arrived, left, closed, shows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.arrived.put([int(input_ids[0, -1])] if self.shows else [])
        stops = self.left.is_set() or self.closed.is_set()
        return torch.full((input_ids.shape[0],), stops, device=input_ids.device, dtype=torch.bool)


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
