"""Fixtures of the tests of the server, which name this file in `pytest_plugins`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running_server import Running, load, serving

from lora_alpaca import Generator


@pytest.fixture(scope="session")
def generator(tiny_llama: Any) -> Iterator[Generator]:
    """Return a generator over a random Llama, with the template alpaca."""
    found = load(tiny_llama)
    yield found
    found.close()


@pytest.fixture(scope="module")
def server(generator: Generator) -> Iterator[Running]:
    """Return a server over the tiny model."""
    with serving(generator) as running:
        yield running


@pytest.fixture
def serve(generator: Generator) -> Callable[..., Any]:
    """Return `serve(**options)`: a context with a server of its own over the tiny model."""
    return lambda given=generator, **options: serving(given, **options)
