"""What may be asked of the page's server: its own names only, and nothing that has to do with files.

What it sends tells the browser to fetch nothing from elsewhere, whatever stands on the page.

Gradio's server also takes uploads, into a folder that all users of a machine share, and answers under any name, so that
a page from elsewhere whose name is made to point here (DNS rebinding) could read and use it.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lora_alpaca.inference.host_names import is_own

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_POSTS = re.compile(r"/gradio_api/(queue/join|run/[\w-]+|cancel|reset)/?")  # what the page's own buttons send
_FILES = re.compile(r"/(upload|file|proxy|stream|deep_link|monitoring|dev|run-history|runs)(?![a-z])", re.IGNORECASE)
_OWN = "'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # gradio writes scripts and styles into its page
_HEADERS = [
    (
        b"content-security-policy",
        f"default-src {_OWN}; object-src 'none'; base-uri 'self'; form-action 'self'".encode(),
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class PageGuard:
    """An ASGI application that hands on what may be asked of another one. Names may be added to `names` later."""

    def __init__(self, app: Any, host: str, names: set[str]):
        self._app, self._host, self._names = app, host, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it in one line."""
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None

        async def send_own(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        if refusal is None:
            await self._app(scope, receive, send_own)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, reason = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode()})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return the status and the line that refuse a request, or None."""
        headers: dict[bytes, list[str]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.lower(), []).append(value.decode("latin-1"))
        hosts, origins = headers.get(b"host", []), headers.get(b"origin", [])
        if len(hosts) != 1 or not is_own(f"//{hosts[0]}", self._host, self._names):
            return 400, f"this page is not served under this name; --server_name says under which (now {self._host})\n"
        if not all(is_own(origin, self._host, self._names) for origin in origins):
            return 403, "a page from elsewhere may not use this one\n"
        path, method = scope["path"], scope.get("method", "GET")
        if method not in ("GET", "HEAD") and not (method == "POST" and _POSTS.fullmatch(path)):
            return 405, "this page takes no files\n"
        return (404, "this page has no files\n") if _FILES.search(path) else None
