"""A server on a free port, over a tiny model, and clients for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import openai

from lora_alpaca import GenerateConfig, Generator
from lora_alpaca.inference.addresses import listen
from lora_alpaca.inference.sampling import Request, Token
from lora_alpaca.inference.server.app import build
from lora_alpaca.inference.server.listening import Listening
from lora_alpaca.inference.server.service import Service
from lora_alpaca.inference.token_generator import Channel, TokenStream


class Running(NamedTuple):
    """A server that listens: its address, its state, its thread, and a client of either kind."""

    url: str
    service: Service
    listening: Listening
    http: httpx.Client
    client: openai.OpenAI

    def ask(self, content: str = "Where does the owl live?", **parameters: Any) -> Any:
        """Return the answer to a question; greedy and short unless said otherwise."""
        messages = parameters.pop("messages", [{"role": "user", "content": content}])
        chosen = {"model": "", "temperature": 0, "max_tokens": 12} | parameters
        return self.client.chat.completions.create(messages=messages, **chosen)

    def post(self, path: str = "/v1/chat/completions", **parameters: Any) -> httpx.Response:
        """Return the response to a JSON object."""
        return self.http.post(path, json=parameters)


@contextmanager
def serving(generator: Any, key: str = "", host: str = "127.0.0.1", **options: Any) -> Iterator[Running]:
    """Yield a server over a generator, which is opened unless it is None."""
    service = Service(GenerateConfig(serve=True, **options))
    opened = listen(host, 0, ())
    with Listening(build(service, host, key), opened.socket, 400) as listening:
        if generator is not None:
            service.open(generator)
        url = f"http://127.0.0.1:{opened.port}"
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=60)
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http, client:
            yield Running(url, service, listening, http, client)


def load(base: Any, **options: Any) -> Generator:
    """Return a generator over a base, in fp32."""
    chosen = {"lora_weights": "none", "prompt_template": "alpaca", "dtype": "fp32", "device": "cpu"} | options
    return Generator.load(GenerateConfig(base_model=str(base), **chosen))


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a response, which has OpenAI's shape and a status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    found = response.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert isinstance(found["error"]["message"], str) and found["error"]["message"]
    return found["error"]


class Metronome:
    """A token generator whose every answer is one token again and again, as often as was asked, one a tick.

    `channels` are those of all answers, `made` counts the tokens of each. `tick()` makes a tick, and `run(seconds)`
    one every so often.
    """

    def __init__(self, token: int):
        self.token = token
        self.channels: list[Channel] = []
        self.made: list[int] = []
        self._most: list[int] = []
        self._closed = threading.Event()

    def generate(self, request: Request) -> TokenStream:
        channel = Channel()
        self.made.append(0)
        self._most.append(request.sampling.max_new_tokens or 0)
        self.channels.append(channel)
        return TokenStream(channel)

    def tick(self) -> None:
        for number, channel in enumerate(list(self.channels)):
            if not channel.left.is_set() and self.made[number] < self._most[number]:
                channel.put([Token(self.token)])
                self.made[number] += 1
                if self.made[number] == self._most[number]:
                    channel.end()

    def run(self, seconds: float) -> None:
        def tick() -> None:
            while not self._closed.wait(seconds):
                self.tick()

        threading.Thread(target=tick, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        for channel in self.channels:
            channel.end(RuntimeError("the token generator is closed"))


def scripted(generator: Generator, tokens: Any) -> Generator:
    """Return a generator with the codecs of another one, and a token generator of the test's own."""
    return Generator(generator.codecs, tokens, generator.sampling, generator.max_length, base_name="scripted")
