"""The token generator that answers many requests at the same time, a step of the model for all of them."""

import queue
import threading
import weakref
from collections import deque
from contextlib import suppress

import torch

from lora_alpaca.inference import workers
from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.one_at_a_time import OneAtATime
from lora_alpaca.inference.sampling import Request
from lora_alpaca.inference.scheduler import equivalence
from lora_alpaca.inference.scheduler.lane import Counts, Lane, Running
from lora_alpaca.inference.scheduler.prefixes import Prefixes
from lora_alpaca.inference.token_generator import Channel, TokenGenerator, TokenStream
from lora_alpaca.models.memory import free_and_total

CHUNK = {"cpu": 256, "cuda": 2048}  # tokens of prompts in a step
SAVED_TOKENS = 8192  # of texts that were answered, if they take no more than a fourth of the cache's memory


def token_generator(adapters: Adapters, places: int, max_length: int | None) -> tuple[TokenGenerator, list[str]]:
    """Return what answers on a model, and notes: the scheduler, unless the model computes something else in steps."""
    with adapters.using(adapters.names[0]) as model:
        verdict = equivalence.check(model)
    if verdict.reason:
        return OneAtATime(adapters), [f"this model makes one answer at a time: {verdict.reason}"]
    return Scheduler(adapters, places, max_length, verdict.bytes_per_token), []


class Scheduler:
    """Requests wait in a queue until there is a place; a thread makes a token of each that has one, step by step.

    Beam searches are left to `generate` of transformers, which takes turns at the model with the steps.
    """

    def __init__(self, adapters: Adapters, places: int = 32, max_length: int | None = None, bytes_per_token: int = 0):
        turns = workers.Turns()
        self._alone = OneAtATime(adapters, turns=turns)
        self._loop = _Loop(adapters, turns, places, max_length, bytes_per_token)
        weakref.finalize(self, self._loop.inbox.put, None)

    @property
    def counts(self) -> Counts:
        """Return what was done so far, in numbers."""
        return self._loop.counts

    def generate(self, request: Request) -> TokenStream:
        if request.sampling.num_beams > 1:
            return self._alone.generate(request)
        channel = Channel()
        self._loop.submit(request, channel)
        return TokenStream(channel)

    def score(self, request: Request) -> TokenStream:
        return self._alone.score(request)

    def close(self) -> None:
        self._alone.close()
        self._loop.closed.set()
        self._loop.inbox.put(None)


class _Loop:
    """What the thread works with; it does not know the scheduler, which can be dropped while the thread waits."""

    def __init__(self, adapters: Adapters, turns: workers.Turns, places: int, max_length: int | None, per_token: int):
        self.adapters, self.turns, self.places, self.max_length = adapters, turns, places, max_length
        self.device = adapters.model.device
        self.per_token = per_token  # bytes
        self.memory = free_and_total(self.device)[0] // 4  # planned; rows are made before they are needed
        saved = min(SAVED_TOKENS, self.memory // 4 // max(1, per_token))
        self.counts = Counts()
        chunk = CHUNK.get(self.device.type, CHUNK["cpu"])
        self.lanes = {name: Lane(Prefixes(saved), self.counts, chunk, places) for name in adapters.names}
        self.inbox: queue.SimpleQueue[Running | None] = queue.SimpleQueue()
        self.waiting: deque[Running] = deque()
        self.closed = threading.Event()
        self.dropped = False  # nobody can ask any more
        self._door = threading.Lock()  # nobody comes in while it is closed
        self._worker: threading.Thread | None = None

    def submit(self, request: Request, channel: Channel) -> None:
        """Let a request wait for its place. The first one starts the thread."""
        most = request.sampling.max_new_tokens or (self.max_length or 1 << 20)
        limit = len(request.prompt_ids) + most
        answer = Running(request, channel, min(limit, self.max_length or limit))
        with self._door:
            if self.closed.is_set() and not workers.leaving.is_set():
                raise RuntimeError("the token generator is closed")
            self.inbox.put(answer)
            if self._worker is None:
                inbox = self.inbox  # and not the loop, which would never be free
                self._worker = workers.start(self.run, lambda: inbox.put(None))

    # ------------------------------------------------------------------------------------------------- the thread

    def run(self) -> None:
        """Answer what comes, until there is no one left who could ask."""
        error: BaseException = RuntimeError("the token generator is closed")
        try:
            with torch.inference_mode():
                while self._arrived():
                    for name in self.lanes:
                        self._turn(name)
        except BaseException as broken:  # a fault of this code: nobody shall wait for ever
            error = broken
        self.closed.set()
        if workers.leaving.is_set():  # the process ends, and who reads now ends with it
            return
        with self._door:
            self._take_in()
        for answer in self.waiting:
            answer.channel.end(error)
        for lane in self.lanes.values():
            lane.fail(error)

    @property
    def _stopped(self) -> bool:
        return self.closed.is_set() or workers.leaving.is_set()

    def _note(self, item: Running | None) -> None:
        if item is None:
            self.dropped = True
        else:
            self.waiting.append(item)

    def _take_in(self) -> None:
        """Take in what has arrived."""
        with suppress(queue.Empty):
            while True:
                self._note(self.inbox.get_nowait())

    def _arrived(self) -> bool:
        """Wait until there is work. Return False at the end of all."""
        while not self._stopped:
            self._take_in()
            if self.waiting or any(lane.running for lane in self.lanes.values()):
                return True
            if self.dropped:
                return False
            self._note(self.inbox.get())
        return False

    def _turn(self, name: str) -> None:
        """Make steps for the answers of one adapter, until someone else wants the model."""
        lane = self.lanes[name]
        self._admit()
        if not lane.running:
            return
        with self.turns, self.adapters.using(name) as model:
            while lane.running and not self._stopped:
                try:
                    lane.step(model)
                except BaseException as error:  # whatever it is, it is theirs who were answered
                    lane.fail(error)
                self._take_in()
                self._admit()
                if self.turns.wanted or any(other.running for other in self.lanes.values() if other is not lane):
                    return

    def _admit(self) -> None:
        """Free the places of those who left, and give places to those who wait, in their order."""
        for lane in self.lanes.values():
            for answer in [answer for answer in lane.running if answer.channel.left.is_set()]:
                lane.remove(answer)
        postponed = []
        while self.waiting:
            answer = self.waiting.popleft()
            lane = self.lanes[answer.request.adapter]
            if answer.channel.left.is_set():
                continue
            if not self._has_place(lane, answer):
                self.waiting.appendleft(answer)
                break
            if lane.begins_as_one_at_work(answer.ids):
                postponed.append(answer)  # for a step or so; then its beginning is copied
                continue
            try:
                lane.add(answer)
            except Exception as error:  # no memory
                lane.running.remove(answer)
                answer.channel.end(error)
        self.waiting.extendleft(reversed(postponed))

    def _has_place(self, lane: Lane, answer: Running) -> bool:
        """Return whether there is a place, and memory for all that the answers may come to."""
        running = sum(len(other.running) for other in self.lanes.values())
        if running == 0:
            return True
        if running >= self.places or lane.unread >= lane.chunk:
            return False
        tokens = sum(len(other.running) * other.longest for other in self.lanes.values() if other is not lane)
        tokens += (len(lane.running) + 1) * max(lane.longest, answer.limit)
        return tokens * self.per_token <= self.memory
