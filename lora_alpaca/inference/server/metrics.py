"""What `/metrics` tells Prometheus: requests, tokens, the queue and how long things take. Nothing of what was asked."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "Metrics"]
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self, running: Callable[[], float], waiting: Callable[[], float]):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lora_alpaca_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=self.registry
        )
        self.prompt_tokens = self._tokens("prompt", "Tokens of prompts.")
        self.completion_tokens = self._tokens("completion", "Tokens of answers.")
        self.seconds = self._histogram("request_seconds", "From a request to the end of its answers.")
        self.first_token = self._histogram("first_token_seconds", "From a request to the first token of its answers.")
        self.left = Counter("lora_alpaca_clients_left", "Clients that left before the end.", registry=self.registry)
        self._gauge("running", "Answers that are being made.", running)
        self._gauge("waiting", "Answers that wait for their first token.", waiting)
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self.registry)

    def _tokens(self, kind: str, words: str) -> Counter:
        return Counter(f"lora_alpaca_{kind}_tokens", words, ["model"], registry=self.registry)

    def _histogram(self, name: str, words: str) -> Histogram:
        return Histogram(f"lora_alpaca_{name}", words, ["endpoint"], buckets=_SECONDS, registry=self.registry)

    def _gauge(self, name: str, words: str, value: Callable[[], float]) -> None:
        Gauge(f"lora_alpaca_answers_{name}", words, registry=self.registry).set_function(value)
