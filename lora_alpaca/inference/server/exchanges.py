"""A request and its choices, from the body to the objects that are sent: what both endpoints have in common."""

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from lora_alpaca.errors import ConfigError, LoraAlpacaError
from lora_alpaca.inference.answer import Answer
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.inference.server.bodies import Body
from lora_alpaca.inference.server.choices import TokenLog, usage
from lora_alpaca.inference.server.models import Models


class Exchange:
    """What is asked and what is answered. `places` is the number of answers, `answers` are there once asked for."""

    prefix: ClassVar[str]
    kind: ClassVar[str]  # what an answer is called, and a piece of one
    chunk_kind: ClassVar[str]

    def __init__(self, body: Body, models: Models, generator: Generator):
        self.adapter = models.adapter(body.model)
        self.model = models.name(self.adapter)
        self.generator, self.codec = generator, generator.codecs[self.adapter]
        self.stream, self.include_usage = body.stream, body.include_usage
        self.answers: list[Answer] = []
        self.logs: list[TokenLog] = []
        self._body = body
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
        self._head["model"] = body.model or self.model

    @property
    def places(self) -> int:
        """Return how many answers are asked for."""
        return self._body.n

    def ask(self) -> list[Answer]:
        """Ask for the answers, in the order of their choices. Raises ApiError 400 for what cannot be answered."""
        raise NotImplementedError

    def begin(self, answers: list[Answer]) -> None:
        """Take the answers, which begin to be read."""
        self.answers = answers
        self.logs = [TokenLog(answer) for answer in answers]

    def close(self) -> None:
        """Stop the answers where they are."""
        for answer in self.answers:
            answer.close()

    def opening(self) -> list[dict[str, Any]]:
        """Return the choices of a stream before there is any text."""
        return []

    def piece(self, number: int, piece: str) -> list[dict[str, Any]]:
        """Return what of a choice a piece of its text adds to a stream; at the end, why it ended, too."""
        raise NotImplementedError

    def choice(self, number: int) -> dict[str, Any]:
        """Return a choice that is complete."""
        raise NotImplementedError

    def chunk(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return an object of a stream."""
        found = self._head | {"object": self.chunk_kind, "choices": list(choices)}
        return found | ({"usage": None} if self.include_usage else {})

    def usage_chunk(self) -> dict[str, Any]:
        """Return the object of a stream that has the counts of tokens."""
        return self.chunk([]) | {"usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        """Return the answer to a request that is not streamed."""
        choices = [self.choice(number) for number in range(len(self.answers))]
        return self._head | {"object": self.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the counts of tokens: those of a prompt once, however many answers it has."""
        return usage(self.answers, self.answers[:: self._body.n])

    def _asked(self, ask: Callable[..., Answer], given: Any, choice: int, **changes: Any) -> Answer:
        """Return an answer that is asked for with the body's sampling. Raises ApiError 400 for what cannot be."""
        changes = self._body.sampling(choice, self.codec.vocabulary) | changes
        try:
            return ask(given, adapter=self.adapter, **changes)
        except ConfigError as error:
            length = self._body.length[0]
            message = str(error).replace("max_new_tokens", length)
            param = length if f"{length} is" in message else message.partition(" ")[0]
            raise ApiError(400, message, param if param in type(self._body).model_fields else None) from None
        except LoraAlpacaError as error:
            raise ApiError(400, str(error)) from None
