"""The thread that serves an application on a socket."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from lora_alpaca.inference.server.api_error import ApiError

IDLE = 20  # seconds that a connection is kept between two requests
SLOWEST_HEADERS = 20.0  # seconds in which the head of a request has to arrive
LARGEST_HEAD = 64 * 2**10  # bytes


class Listening:
    """A context in which an application is served, by a thread of its own. `loop` is its event loop."""

    def __init__(self, app: ASGIApp, opened: socket.socket, most_connections: int):
        self.loop: asyncio.AbstractEventLoop | None = None
        self._socket = opened
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_protocol(most_connections),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # what goes wrong in a request is in its own line
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=IDLE,
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=LARGEST_HEAD,
            )
        )
        self._thread = threading.Thread(target=self._serve, name="server", daemon=True)
        self._listens = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self._listens.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=5)

    def wait(self) -> None:
        """Wait until the thread ends, which it does by itself only if it fails; a signal is an exception here."""
        self._thread.join()

    def run(self, work: Coroutine[Any, Any, Any], seconds: float) -> Any:
        """Return what a coroutine returns in the event loop."""
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def _serve(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            self.loop.call_soon(self._listens.set)
            await self._server.serve(sockets=[self._socket])

        try:
            asyncio.run(main())
        finally:
            self._listens.set()
            self._socket.close()


def _protocol(most_connections: int) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with limits: on connections, and on the time that the head of a request takes."""

    class Connection(H11Protocol):
        """A connection of a client."""

        _since = 0.0  # when it began to be idle, or to send the head of a request

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most_connections:
                self._refuse(ApiError(503, "there are too many connections", code="unavailable"))
            else:
                self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None:
                self._expect_head()
            elif self.conn.their_state is not h11.IDLE:
                self._since = 0.0

        def send_400_response(self, msg: str) -> None:
            self._refuse(ApiError(400, msg))

        def _expect_head(self) -> None:
            """Close the connection if no head of a request is complete in time, however slowly it drips in."""
            self._since = self._since or time.monotonic()
            left = max(0.0, self._since + SLOWEST_HEADERS - time.monotonic())
            self.timeout_keep_alive_task = self.loop.call_later(left, self.timeout_keep_alive_handler)

        def _refuse(self, error: ApiError) -> None:
            """Send an error before there is a request, and close the connection."""
            body = json.dumps(error.body()).encode()
            length = str(len(body)).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
            try:
                for event in (
                    h11.Response(status_code=error.status, headers=headers),
                    h11.Data(data=body),
                    h11.EndOfMessage(),
                ):
                    self.transport.write(self.conn.send(event) or b"")
            except h11.LocalProtocolError:  # an answer is on its way already
                pass
            self.transport.close()

    return Connection
