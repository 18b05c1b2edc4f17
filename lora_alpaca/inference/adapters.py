"""The adapters on a model: one of them answers at a time, or none."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lora_alpaca.inference.sampling import BASE


class Adapters:
    """A model and the adapters that may answer on it, by name; `BASE` is the model without one.

    `put` puts an adapter to work, or none; the first name is at work already.
    """

    def __init__(self, model: Any, names: Sequence[str] = (), put: Callable[[str], None] | None = None):
        self.model, self.names = model, (*names, BASE)
        self._put, self.at_work = put or (lambda name: None), self.names[0]

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """Give the model with one adapter at work, or none. Only one thread may be in here at a time."""
        if name != self.at_work:
            self.at_work = ""  # should it fail half-way, the next call puts every layer right
            self._put(name)
            self.at_work = name
        yield self.model
