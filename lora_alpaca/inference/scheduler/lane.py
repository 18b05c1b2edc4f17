"""The answers of one adapter that are under way, and the step that makes a token of each."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lora_alpaca.inference.sampling import Request, Token
from lora_alpaca.inference.scheduler.attention import Span, Step
from lora_alpaca.inference.scheduler.cache import Cache, common
from lora_alpaca.inference.scheduler.choosing import Chooser, choose
from lora_alpaca.inference.scheduler.lookup import Lookup, Pace
from lora_alpaca.inference.scheduler.prefixes import LEAST, Prefixes
from lora_alpaca.inference.token_generator import Channel

FEW = 4  # answers under way, up to which guesses are tried: with more, a step is no longer bound by reading the weights


@dataclass(eq=False)
class Running:
    """An answer: the tokens of prompt and answer, and how many of them have their keys and values in the cache."""

    request: Request
    channel: Channel
    limit: int  # tokens of prompt and answer at most
    ids: list[int] = field(init=False)
    cached: int = 0
    chooser: Chooser = field(init=False)
    lookup: Lookup = field(init=False)

    def __post_init__(self) -> None:
        self.ids, self.chooser = list(self.request.prompt_ids), Chooser(self.request)
        self.lookup = Lookup(len(self.ids))

    @property
    def guessable(self) -> bool:
        """Return whether tokens that are guessed and found right are those that had been chosen one by one."""
        return self.request.sampling.temperature == 0 and not self.chooser.changes

    @property
    def ready(self) -> bool:
        """Return whether the prompt is read, so that each step makes a token."""
        return self.cached >= len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Return how many tokens the model has not seen."""
        return len(self.ids) - self.cached


class Part(NamedTuple):
    """What a step has of an answer: its tokens from `start` to `stop`, and a guess at those that come next."""

    answer: Running
    row: int
    start: int
    stop: int
    guess: list[int]

    @property
    def is_due(self) -> bool:
        """Return whether the next token of the answer follows."""
        return self.stop == len(self.answer.ids)


@dataclass
class Counts:
    """What the lanes have done, in numbers."""

    steps: int = 0
    prompt_tokens: int = 0  # of the prompts that were taken
    computed_prompt_tokens: int = 0  # of them, those that no text before had
    answer_tokens: int = 0


class Lane:
    """Answers in rows of a cache: first those whose prompt is read, in row 0 to n, then those that are at it."""

    def __init__(self, prefixes: Prefixes, counts: Counts, chunk: int, places: int):
        self.cache, self.prefixes, self.counts, self.chunk, self.places = Cache(), prefixes, counts, chunk, places
        self.pace = Pace()
        self.running: list[Running] = []

    # ------------------------------------------------------------------------------------------- coming and going

    @property
    def longest(self) -> int:
        """Return the most tokens that an answer under way may come to."""
        return max((answer.limit for answer in self.running), default=0)

    @property
    def unread(self) -> int:
        """Return how many tokens of prompts wait to be read."""
        return sum(answer.pending for answer in self.running if not answer.ready)

    def begins_as_one_at_work(self, ids: list[int]) -> bool:
        """Return whether a prompt that is being read will soon hold more of these tokens than can be copied now."""
        reading = [common(answer.ids, ids) for answer in self.running if not answer.ready]
        if max(reading, default=0) < 2 * LEAST:
            return False
        ready = max(min(common(answer.ids, ids), answer.cached) for answer in self.running)
        return max(reading) >= max(ready, self.prefixes.longest(ids)[0]) + 2 * LEAST

    def add(self, answer: Running) -> None:
        """Give an answer a row, with the keys and values of the longest text that its prompt begins with."""
        ids, row = answer.ids, len(self.running)
        shared, saved = self.prefixes.longest(ids)
        source = -1
        for number, other in enumerate(self.running):
            if (here := min(common(other.ids, ids), other.cached, len(ids) - 1)) > max(shared, LEAST - 1):
                shared, source = here, number
        self.running.append(answer)
        self._reserve(len(ids))
        if source >= 0:
            self.cache.copy(source, row, shared)
        elif saved is not None:
            self.cache.load(row, saved, shared)
        answer.cached = shared
        self.counts.prompt_tokens += len(ids)
        self.counts.computed_prompt_tokens += len(ids) - shared

    def remove(self, answer: Running, keep: bool = True) -> None:
        """Free the row of an answer, and close the gap with the last one that is as far as it."""
        row = self.running.index(answer)
        if keep:
            self.prefixes.add(answer.ids[: answer.cached], self.cache, row)
        else:
            self.cache.clear(row)
        ready = sum(other.ready for other in self.running)
        for last in (ready - 1 if answer.ready else row, len(self.running) - 1):
            if row < last:
                self.running[row] = self.running[last]
                self.cache.copy(last, row, self.running[row].cached)
                row = last
        del self.running[row]

    def _reserve(self, length: int) -> None:
        length = max(length, *(len(answer.ids) for answer in self.running))
        self.cache.reserve(len(self.running), length, self.places, max(self.longest, length))

    # ------------------------------------------------------------------------------------------------- a step

    def step(self, model: Any) -> None:
        """Read some of the prompts, and make a token of every answer whose prompt is read, or several by a guess."""
        parts = self._parts()
        began = time.perf_counter()
        logits = self._forward(model, parts)
        self.counts.steps += 1
        due = [part for part in parts if part.is_due]
        choosers = [part.answer.chooser for part in due for _ in range(1 + len(part.guess))]
        choices = choose(logits, choosers) if due else []
        if all(part.answer.ready for part in parts):
            self.pace.learn(sum(1 + len(part.guess) for part in parts), time.perf_counter() - began)
        for part in parts:
            part.answer.cached = part.stop
        ended = []
        for part in due:
            mine, choices = choices[: 1 + len(part.guess)], choices[1 + len(part.guess) :]
            ends, error = self._take(part, mine)
            if ends:
                ended.append((part.answer, error))
        for answer, error in ended:  # now that all know how much of their rows is theirs, rows may move
            self.remove(answer, keep=error is None)
            answer.channel.end(error)

    def fail(self, error: BaseException) -> None:
        """End every answer with an error, and forget their keys and values."""
        for answer in self.running:
            answer.channel.end(error)
        self.running.clear()
        self.prefixes.clear()
        self.cache.release()

    def _parts(self) -> list[Part]:
        """Return which tokens of which answers are in the next step: one of each whose prompt is read, and prompts."""
        parts = []
        left = self.chunk
        few = len(self.running) <= FEW
        for row, answer in enumerate(self.running):
            if answer.ready:
                room = answer.limit - len(answer.ids) - 1
                guess: list[int] = []
                if few and answer.guessable and room > 0:
                    guess = answer.lookup.guess(answer.ids, room, self.pace, len(self.running))
                parts.append(Part(answer, row, answer.cached, len(answer.ids), guess))
            elif left:
                stop = min(len(answer.ids), answer.cached + left)
                left -= stop - answer.cached
                parts.append(Part(answer, row, answer.cached, stop, []))
        return parts

    def _forward(self, model: Any, parts: list[Part]) -> torch.Tensor:
        """Return the logits of the last tokens of parts that are due, and of their guesses."""
        ids: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        keep: list[int] = []
        guesses = 0  # tokens in spans that are guesses, or that guesses follow
        for part in parts:
            end = part.stop + len(part.guess)
            if spans or not part.answer.ready or part.guess:
                spans.append(Span(part.row, part.start, end, len(ids)))
                guesses += (end - part.start) * part.answer.ready
            ids += part.answer.ids[part.start : part.stop] + part.guess
            rows += [part.row] * (end - part.start)
            positions += range(part.start, end)
            if part.is_due:
                keep += range(len(ids) - len(part.guess) - 1, len(ids))
        self._reserve(1 + max(positions))
        step = Step(self.cache, ids, rows, positions, spans, guesses).to(model.device)
        logits: torch.Tensor = model(**step.inputs(), logits_to_keep=torch.tensor(keep or [0]).to(model.device)).logits
        return logits[0]

    def _take(self, part: Part, choices: Sequence[Token | Exception]) -> tuple[bool, Exception | None]:
        """Hand over the tokens of an answer: those that were guessed right, and one more. Return whether it ends."""
        answer, made = part.answer, list[Token]()
        error: Exception | None = None
        ended = False
        for choice, guessed in zip(choices, [*part.guess, None], strict=True):
            if isinstance(choice, Exception):
                error = choice
                break
            made.append(choice)
            answer.ids.append(choice.id)
            ended = choice.id in answer.request.stop_ids or len(answer.ids) >= answer.limit
            if ended or choice.id != guessed:
                break
        if part.guess:
            answer.cached += max(0, len(made) - 1)
        self.counts.answer_tokens += len(made)
        if made:
            answer.channel.put(made)
        return ended or error is not None, error
