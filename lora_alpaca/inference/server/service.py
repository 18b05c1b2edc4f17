"""The state of a server: its generator once loaded, the requests under way, and whether it is well."""

import asyncio
import math
import sys
import time
import traceback
from contextlib import suppress

from lora_alpaca.config import GenerateConfig
from lora_alpaca.errors import ModelError, visible
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.server.admission import Admission
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.inference.server.constraints import Grammars
from lora_alpaca.inference.server.exchanges import Exchange
from lora_alpaca.inference.server.metrics import Metrics
from lora_alpaca.inference.server.models import Models
from lora_alpaca.inference.server.reading import in_thread

LOADING, DRAINING = "the model is being loaded", "the server is stopping"


class Service:
    """What the routes share. But for `open` and `drain` it belongs to the thread of the event loop."""

    def __init__(self, config: GenerateConfig):
        self.admission = Admission(config.max_batch, config.max_waiting)
        self.grammars = Grammars()
        self.exchanges: set[Exchange] = set()
        self.tasks: set[asyncio.Task[None]] = set()  # that read answers
        self.metrics = Metrics(self._running, lambda: self.admission.taken - self._running())
        self.trouble = LOADING  # why nothing is answered; empty while all is well
        self.cutting = False  # answers are ended where they are
        self._generator: Generator | None = None
        self._models: Models | None = None
        self._probing = False

    def open(self, generator: Generator) -> None:
        """Begin to answer. Raises ModelError for a model whose scores are no numbers."""
        probe(generator)
        self.use(generator)

    def use(self, generator: Generator) -> None:
        """Answer from now on, with a generator that is known to be well."""
        self._generator, self._models = generator, Models(generator, int(time.time()))
        self.trouble = ""

    @property
    def generator(self) -> Generator:
        """Return what answers. Raises ApiError 503 while nothing does."""
        if self._generator is None or self.trouble:
            raise ApiError(503, self.trouble or LOADING, code="unavailable", headers={"retry-after": "5"})
        return self._generator

    @property
    def models(self) -> Models:
        """Return the models that can be asked. Raises ApiError 503 before they are loaded."""
        if self._models is None:
            raise ApiError(503, LOADING, code="unavailable", headers={"retry-after": "5"})
        return self._models

    async def drain(self, grace: float) -> int:
        """Take no new requests, let those under way finish, and cut them after some seconds; return how many were."""
        self.trouble = DRAINING
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=grace)
        self.cutting, cut = True, set(self.tasks)
        for task in cut:
            task.cancel()
        if cut:
            await asyncio.wait(cut, timeout=1)
        return len(cut)

    def failed(self, error: BaseException) -> None:
        """Print an error that nobody caused by a request, and find out whether the model still answers."""
        lines = traceback.format_exception(error)
        print(visible("".join(lines)).rstrip(), file=sys.stderr)
        if self._generator is not None and not self._probing:
            self._probing = True
            task = asyncio.get_running_loop().create_task(self._probe(self._generator))
            _KEPT.add(task)
            task.add_done_callback(_KEPT.discard)

    async def _probe(self, generator: Generator) -> None:
        trouble = "the model fails"
        with suppress(Exception):
            await in_thread(lambda: probe(generator))
            trouble = ""
        self._probing = False
        if self.trouble not in (LOADING, DRAINING):
            self.trouble = trouble

    def _running(self) -> float:
        return sum(answer.completion_tokens > 0 for exchange in self.exchanges for answer in exchange.answers)


_KEPT: set[asyncio.Task[None]] = set()  # the loop itself holds tasks weakly


def probe(generator: Generator) -> None:
    """Have every adapter make a token. Raises ModelError for one whose scores are no numbers, and what it raises."""
    for name in generator.names:
        answer = generator.complete([0], name, max_new_tokens=1, temperature=0, num_beams=1, logprobs=0)
        answer.read()
        if any(not math.isfinite(token.logprob) for token in answer.tokens):
            raise ModelError(
                f"the scores of {name} are no numbers (NaN); its weights are damaged, or overflow in 16 bits"
            )
