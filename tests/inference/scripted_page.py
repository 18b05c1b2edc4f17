"""The web page without a browser, over a model whose answers are scripted."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gradio as gr
import pytest
import transformers

from lora_alpaca.config import GenerateConfig
from lora_alpaca.inference.codec import Codec
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.page import asking
from lora_alpaca.inference.page.layout import build
from lora_alpaca.inference.sampling import Request, Sampling, Token
from lora_alpaca.inference.token_generator import Channel, TokenStream
from lora_alpaca.models.base import demo_base
from lora_alpaca.prompts import load_template


@contextmanager
def closed_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let pictures follow each other without a pause, and close the event loops that gradio leaves open."""
    monkeypatch.setattr(asking, "PICTURE", 0)
    monkeypatch.setattr(asking, "HEARTBEAT", 0.02)
    made: list[asyncio.AbstractEventLoop] = []
    make = asyncio.new_event_loop

    def remember() -> asyncio.AbstractEventLoop:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", remember)
    yield
    asyncio.set_event_loop(None)
    for loop in made:
        loop.close()


@cache
def demo_tokenizer() -> Any:
    """Return the tokenizer of the demo's base."""
    return transformers.AutoTokenizer.from_pretrained(demo_base())


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class Scripted:
    """A token generator whose every answer is a text, token by token, then an error if there is one.

    With `hold`, answers do not end until their readers leave.
    """

    def __init__(self, tokenizer: Any, text: str = "Alpacas hum.", error: Exception | None = None, hold: bool = False):
        self.tokenizer, self.text, self.error, self.hold = tokenizer, text, error, hold
        self.requests: list[Request] = []
        self.channels: list[Channel] = []

    def generate(self, request: Request) -> TokenStream:
        self.requests.append(request)
        channel = Channel()
        self.channels.append(channel)
        numbers = ids_of(self.tokenizer, self.text)[: request.sampling.max_new_tokens]
        for number in numbers:
            channel.put([Token(number)])
        if self.error is not None:
            channel.end(self.error)
        elif not self.hold:
            if len(numbers) < (request.sampling.max_new_tokens or 0):
                channel.put([Token(next(iter(request.stop_ids)))])
            channel.end()
        return TokenStream(channel)

    def close(self) -> None:
        pass

    @property
    def open(self) -> int:
        """Return how many answers somebody still waits for."""
        return sum(not channel.left.is_set() for channel in self.channels)

    def prompts(self) -> list[str]:
        """Return what was asked, as text."""
        return [self.tokenizer.decode(list(request.prompt_ids)) for request in self.requests]


def generator_of(scripted: Scripted, template: str = "alpaca", names: tuple[str, ...] = ("tuned", "base")) -> Generator:
    """Return a generator with the demo's tokenizer, a context of 512 tokens, and scripted answers."""
    codec = Codec(scripted.tokenizer, load_template(template), None, len(scripted.tokenizer))
    return Generator(dict.fromkeys(names, codec), scripted, Sampling(), 512, base_name="demo")


class Page:
    """The functions behind a page, called as gradio calls them."""

    def __init__(self, scripted: Scripted, template: str = "alpaca", names: Any = ("tuned", "base"), **options: Any):
        self.scripted = scripted
        self.config = GenerateConfig(**{"lora_weights": "nowhere"} | options)
        self.generator = generator_of(scripted, template, names)
        self.blocks = build(self.generator, self.config)

    def tab(self, name: str) -> Any:
        """Return a tab: ChatTab, FormTab or CompareTab."""
        owners = (getattr(event.fn, "__self__", None) for event in self.blocks.fns.values())
        return next(owner for owner in owners if type(owner).__name__ == name)

    @property
    def settings(self) -> Any:
        return self.tab("ChatTab").settings

    def values(self, **changes: Any) -> list[Any]:
        """Return the values of the controls, of which some were changed by their labels."""
        found = {block.label: block.value for block in self.settings.inputs}
        assert set(changes) <= {label.replace(" ", "_") for label in found}
        return [changes.get(label.replace(" ", "_"), value) for label, value in found.items()]

    def ask(self, tab: str = "ChatTab", session: str = "one", **changes: Any) -> Iterator[Any]:
        """Return the pictures of an answer to "Say it." in a tab."""
        request, values = gr.Request(session_hash=session), self.values(**changes)
        if tab == "ChatTab":
            return self.tab(tab).send("Say it.", [], request, *values)
        sides = ["base", "tuned"] if tab == "CompareTab" else []
        return self.tab(tab).answer("Say it.", "", *sides, request, *values)

    def chat(self, turns: list[Any], *asked: Any, do: str = "send", **changes: Any) -> tuple[dict[str, Any], list[Any]]:
        """Return what the view and the turns are after one of the chat's actions."""
        request = gr.Request(session_hash="one")
        arguments = {"send": [*asked, turns, request], "retry": [turns, request], "edit": [turns, request, *asked]}[do]
        *_, (view, after, _) = getattr(self.tab("ChatTab"), do)(*arguments, *self.values(**changes))
        return view, after


TABS = ("ChatTab", "FormTab", "CompareTab")
