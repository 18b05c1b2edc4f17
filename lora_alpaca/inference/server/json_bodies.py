"""The body of a request: bounded in size, time and depth, and JSON that means one thing."""

import asyncio
import json
import math
from typing import Any

from starlette.requests import ClientDisconnect, Request

from lora_alpaca.inference.server.api_error import ApiError

LARGEST_BODY = 4 * 2**20  # bytes; a prompt of a million tokens fits
SLOWEST_BODY = 30.0  # seconds
DEEPEST = 64  # lists and objects in each other; schemas and tools of people are below 20


async def read_body(request: Request) -> bytes:
    """Return the body of a request. Raises ApiError 411, 413 and 408."""
    length = request.headers.get("content-length")
    if length is not None and (not length.isascii() or not length.isdecimal() or int(length) > LARGEST_BODY):
        raise _too_large()
    body = bytearray()
    try:
        async with asyncio.timeout(SLOWEST_BODY):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise _too_large()
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {SLOWEST_BODY:.0f} s", headers=_LAST) from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before its request was complete") from None
    return bytes(body)


_LAST = {"connection": "close"}  # the rest of the body is not read


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large", headers=_LAST)


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raises ApiError 400 for anything else, and for what has two readings.

    Those are a name that is there twice, numbers that JSON does not have, and texts that no encoding can hold.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"byte {error.start} is not UTF-8") from None
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except ValueError as error:  # of our own hooks, and of a whole number with thousands of digits
        raise _invalid(str(error)) from None
    if not isinstance(found, dict):
        raise _invalid("it is not an object")
    if text.count("[") + text.count("{") > DEEPEST and _depth(found) > DEEPEST:
        raise _invalid(f"it is nested more than {DEEPEST} deep")
    if "\\u" in text:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _invalid("a text holds half of a surrogate pair") from None
    return found


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} is there twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _depth(value: Any) -> int:
    """Return how many lists and objects of a value are in each other."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth
