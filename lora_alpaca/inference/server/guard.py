"""What stands before every route: own names, the key, the state of the server; and the line of the log behind them."""

import asyncio
import hashlib
import hmac
import sys
import time
from collections.abc import Collection
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_alpaca.errors import visible
from lora_alpaca.inference.host_names import is_own, own_names
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.inference.server.service import Service

OPEN = ("/health",)  # needs no key, tells nothing
SLOWEST_READER = 60.0  # seconds in which a client takes nothing of what is sent to it


class Guard:
    """An ASGI application that hands on to another one what may be asked of it, and logs a line for each request."""

    def __init__(self, app: ASGIApp, service: Service, host: str, key: str, endpoints: Collection[str]):
        self._app, self._service, self._host, self._endpoints = app, service, host, endpoints
        self._names = own_names(host)
        self._key = _digest(key.encode()) if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it in the form of OpenAI's errors."""
        since, status = time.perf_counter(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            try:
                async with asyncio.timeout(SLOWEST_READER):
                    await send(message)
            except TimeoutError:
                raise ConnectionAbortedError("the client takes nothing") from None

        scope["state"] = {}
        try:
            try:
                self._check(scope)
                await self._app(scope, receive, send_on)
            except ApiError as error:
                await error_response(error)(scope, receive, send_on)
            except OSError:  # of the connection
                scope["state"]["left"] = True
            except Exception as error:
                self._service.failed(error)
                if not status:
                    await error_response(ApiError(500, "the server failed at this request"))(scope, receive, send_on)
        finally:
            self._log(scope, 499 if scope["state"].get("left") else status, time.perf_counter() - since)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a request that is not to be answered."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts, origins = ([value.decode("latin-1") for value in headers.get(name, [])] for name in (b"host", b"origin"))
        if len(hosts) != 1 or not is_own(f"//{hosts[0]}", self._host, self._names):
            raise ApiError(
                400, f"nothing is served under this name; --server_name says under which (now {self._host})", "Host"
            )
        if not all(is_own(origin, self._host, self._names) for origin in origins):
            raise ApiError(403, "a page from elsewhere may not use this server", "Origin")
        if scope["path"] not in OPEN and not self._has_key(headers.get(b"authorization", [])):
            raise ApiError(
                401,
                "the key is missing or wrong: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": 'Bearer realm="lora_alpaca"'},
            )
        if scope["method"] == "POST" and scope["path"] in self._endpoints:
            kinds = headers.get(b"content-type", [])
            if len(kinds) != 1 or kinds[0].partition(b";")[0].strip().lower() != b"application/json":
                raise ApiError(415, "the body has to be JSON: send `Content-Type: application/json`", "Content-Type")
            if any(value.strip().lower() != b"identity" for value in headers.get(b"content-encoding", [])):
                raise ApiError(415, "a compressed body is not taken", "Content-Encoding")

    def _has_key(self, given: list[bytes]) -> bool:
        if self._key is None:
            return True
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key.strip()), self._key)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope.get("raw_path", b"").decode("latin-1")[:200]
        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
        self._service.metrics.requests.labels(endpoint, str(status)).inc()
        client = scope.get("client") or ("-", 0)
        counts: dict[str, Any] = scope["state"].get("usage", {})
        tokens = "".join(f" {name}={counts[name]}" for name in ("prompt_tokens", "completion_tokens") if name in counts)
        line = f'{client[0]} "{scope["method"][:20]} {path}" {status} {seconds:.3f}s{tokens}'
        print(visible(line).replace("\n", "\\n").replace("\t", "\\t"), file=sys.stderr, flush=True)


def error_response(error: ApiError) -> JSONResponse:
    """Return the response of an error."""
    return JSONResponse(error.body(), error.status, error.headers)


def _digest(key: bytes) -> bytes:
    """Return what is compared instead of a key: of one length, whatever is sent."""
    return hashlib.sha256(key).digest()
