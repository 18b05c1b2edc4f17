"""Errors in the form that OpenAI's clients read."""

from typing import Any

from lora_alpaca.errors import visible

LONGEST = 1000  # characters of a message
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a request is refused with: a status, a sentence, the parameter at fault, and a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the error; what it quotes has no control characters."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = visible(self.message).replace("\n", "\\n")
        message = message if len(message) <= LONGEST else f"{message[: LONGEST - 4]} ..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}
