"""The routes of the API."""

import json
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from lora_alpaca.inference.server import metrics
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.inference.server.chat import ChatExchange
from lora_alpaca.inference.server.completions import CompletionExchange
from lora_alpaca.inference.server.exchanges import Exchange
from lora_alpaca.inference.server.guard import Guard, error_response
from lora_alpaca.inference.server.json_bodies import parse_object, read_body
from lora_alpaca.inference.server.reading import in_thread
from lora_alpaca.inference.server.replies import Reply
from lora_alpaca.inference.server.service import Service

CHAT, COMPLETIONS, MODELS, HEALTH, METRICS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/health",
    "/metrics",
)


def build(service: Service, host: str = "127.0.0.1", key: str = "") -> ASGIApp:
    """Return the ASGI application that answers on `host`, to those who have the key, if there is one."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await reply(
            request, lambda given: ChatExchange(given, service.models, service.generator, service.grammars)
        )

    @app.post(COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await reply(request, lambda given: CompletionExchange(given, service.models, service.generator))

    @app.get(MODELS)
    async def models() -> Response:
        return JSONResponse(service.models.listing())

    @app.get(MODELS + "/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(service.models.entry(name))

    @app.get(HEALTH)
    async def health() -> Response:
        return JSONResponse({"status": service.trouble or "ok"}, 503 if service.trouble else 200)

    @app.get(METRICS)
    async def figures() -> Response:
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def reply(request: Request, exchange: Any) -> Response:
        service.generator  # noqa: B018  before the body is read, whether there is one
        body = await read_body(request)
        found: Exchange = await in_thread(lambda: exchange(parse_object(body)))
        return Reply(service, found, request.url.path)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        where = json.dumps(request.url.path[:200])[1:-1]
        known = f"there are POST {CHAT}, POST {COMPLETIONS}, GET {MODELS}, GET {HEALTH}, GET {METRICS}"
        found = ApiError(
            error.status_code, f"{request.method} {where}: not here; {known}", headers=dict(error.headers or {})
        )
        return error_response(found)

    return Guard(app, service, host, key, (CHAT, COMPLETIONS, MODELS, HEALTH, METRICS))
