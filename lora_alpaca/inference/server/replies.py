"""Answers on their way to a client: as one JSON object, or as events; one who leaves stops them."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lora_alpaca.errors import LoraAlpacaError
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.inference.server.exchanges import Exchange
from lora_alpaca.inference.server.reading import in_thread, together
from lora_alpaca.inference.server.service import DRAINING, Service

_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy (nginx) passes events on as they come
]


class Reply(Response):
    """The response to a request for answers. It takes places in the queue, and frees them whatever happens."""

    def __init__(self, service: Service, exchange: Exchange, endpoint: str):
        super().__init__()
        self.service, self.exchange, self.endpoint = service, exchange, endpoint
        self._started = False
        self._since = time.perf_counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises ApiError where nothing was sent yet."""
        service, exchange = self.service, self.exchange
        service.admission.take(exchange.places)
        service.exchanges.add(exchange)
        work = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_left(receive))
        service.tasks.add(work)
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                scope["state"]["left"] = True
                service.metrics.left.inc()
            elif work.cancelled():
                await self._cut(send)
            else:
                work.result()
        finally:
            work.cancel()
            gone.cancel()
            exchange.close()
            service.tasks.discard(work)
            service.exchanges.discard(exchange)
            service.admission.release(exchange.places, time.perf_counter() - self._since)
            self._count(scope)

    async def _send(self, send: Send) -> None:
        exchange = self.exchange
        exchange.begin(await in_thread(exchange.ask))
        if exchange.stream:
            return await self._send_events(send)
        async with aclosing(self._pieces()) as found:
            async for number, piece in found:
                exchange.piece(number, piece)
        response = JSONResponse(exchange.whole())
        await response({"type": "http"}, _never, send)

    async def _send_events(self, send: Send) -> None:
        exchange = self.exchange
        try:
            async with aclosing(self._pieces()) as found:
                async for number, piece in found:
                    if not self._started:  # an error before the first token has a status of its own
                        self._started = True
                        await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                        await self._events(send, [exchange.chunk([choice]) for choice in exchange.opening()])
                    await self._events(send, [exchange.chunk([choice]) for choice in exchange.piece(number, piece)])
            last = [exchange.usage_chunk()] if exchange.include_usage else []
            await self._events(send, [*last, "[DONE]"], more=False)
        except ApiError as error:
            if not self._started:
                raise
            await self._events(send, [error.body()], more=False)

    async def _pieces(self) -> AsyncGenerator[tuple[int, str], None]:
        """Yield the pieces of all choices. Raises ApiError for whatever the model raises."""
        first = True
        try:
            async with aclosing(together(self.exchange.answers)) as found:
                async for number, piece in found:
                    if first:
                        first = False
                        self.service.metrics.first_token.labels(self.endpoint).observe(self._seconds)
                    yield number, piece
        except (ApiError, OSError):
            raise
        except Exception as error:
            if self.service.trouble == DRAINING:
                raise _stopping() from None
            self.service.failed(error)
            what = str(error) if isinstance(error, LoraAlpacaError) else type(error).__name__
            raise ApiError(500, f"the model failed at this request: {what}", code="model_failed") from error

    async def _cut(self, send: Send) -> None:
        """Tell a client whose answer is ended by the end of the server."""
        if not self._started:
            raise _stopping()
        await self._events(send, [_stopping().body()], more=False)

    async def _events(self, send: Send, events: list[Any], more: bool = True) -> None:
        lines = [event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events]
        body = "".join(f"data: {line}\n\n" for line in lines).encode()
        if body or not more:
            await send({"type": "http.response.body", "body": body, "more_body": more})

    def _count(self, scope: Scope) -> None:
        exchange, metrics = self.exchange, self.service.metrics
        counts = exchange.usage()
        scope["state"]["usage"] = counts
        metrics.prompt_tokens.labels(exchange.model).inc(counts["prompt_tokens"])
        metrics.completion_tokens.labels(exchange.model).inc(counts["completion_tokens"])
        metrics.seconds.labels(self.endpoint).observe(self._seconds)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._since


def _stopping() -> ApiError:
    return ApiError(503, DRAINING, code="unavailable", headers={"retry-after": "5"})


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> Any:
    raise AssertionError("a JSON response reads no request")
