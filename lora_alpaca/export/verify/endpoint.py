"""An OpenAI-compatible server, asked for completions and chats; what it does not know is left out of the question.

Nothing but the endpoint is spoken to: no proxy, no redirect to another place, and no header that tells of this machine.
"""

import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from lora_alpaca.errors import ConfigError
from lora_alpaca.export.verify.comparison import Reply, Said
from lora_alpaca.export.verify.served_receipt import TOP

NEUTRAL = {"repeat_penalty": 1.0, "repetition_penalty": 1.0}  # llama.cpp's name, and that of vLLM, SGLang and TGI
LESS = ({"logprobs", "neutral"}, {"neutral"}, {"logprobs"}, set[str]())  # what is asked for; the first that is taken
UNKNOWN = (400, 404, 405, 422, 500, 501)  # how servers answer to what they do not know
OURS = ("authorization", "host", "content-type", "content-length", "accept", "user-agent", "connection")
BY_IDS = "completions of ids"  # the same path
KEY = "OPENAI_API_KEY"


class Endpoint:
    """A server and the model that it is asked for. Raises ConfigError, in one line, where it cannot be asked."""

    def __init__(self, url: str, model: str = "", key: str = "", timeout: float = 120.0):
        self.url = _base_url(url)
        self._openai = _library()
        self._client = self._openai.OpenAI(
            base_url=self.url,
            api_key=key or "none",  # the client wants one; the header is taken out below
            organization="",
            project="",
            timeout=timeout,
            max_retries=1,  # a server may close a connection that it has kept, as the next question comes
            http_client=self._openai.DefaultHttpxClient(
                trust_env=False,
                follow_redirects=False,
                event_hooks={"request": [lambda request: _only_ours(request.headers, bool(key))]},
            ),
        )
        self._accepted: dict[str, int] = {}  # path -> the place in LESS of what the server takes
        self.refused: dict[str, str] = {}  # path -> what the server said
        self.model = model or self._only_model()

    def complete(self, prompt: str | Sequence[int], new_tokens: int, seed: int = 0) -> Reply | None:
        """Return the greedy continuation of a text, or of ids; None if the server makes none."""
        echo = prompt if isinstance(prompt, str) else ""
        path = "completions" if isinstance(prompt, str) else BY_IDS
        found = self._ask(path, {"prompt": prompt, "max_tokens": new_tokens}, seed, {"logprobs": TOP})
        choice = _choice(found)
        return None if found is None else _reply(found, choice, str(choice.get("text") or "").removeprefix(echo))

    def chat(self, messages: list[dict[str, str]], new_tokens: int, seed: int = 0) -> Reply | None:
        """Return the greedy answer to messages; None if the server makes none."""
        logprobs = {"logprobs": True, "top_logprobs": TOP}
        found = self._ask("chat/completions", {"messages": messages, "max_tokens": new_tokens}, seed, logprobs)
        choice = _choice(found)
        message = choice.get("message")
        text = message.get("content") if isinstance(message, Mapping) else ""
        return None if found is None else _reply(found, choice, str(text or ""))

    def answers(self, path: str) -> bool:
        """Return whether the server has answered at a path."""
        return self._accepted.get(path, len(LESS)) < len(LESS)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _only_model(self) -> str:
        try:
            found = self._client.get("/models", cast_to=object)
        except self._openai.APIStatusError as error:
            raise self._error(error, "name the model with --model") from None
        except self._openai.APIError as error:
            raise self._error(error) from None
        listed = found.get("data") if isinstance(found, Mapping) else None
        names = [str(one.get("id")) for one in listed or [] if isinstance(one, Mapping)]
        if len(names) == 1:
            return names[0]
        what = f"serves {len(names)} models ({', '.join(names[:8])})" if names else "lists no model"
        raise ConfigError(f"--endpoint {self.url}: {what}; name one with --model")

    def _ask(self, path: str, body: dict[str, Any], seed: int, logprobs: dict[str, Any]) -> Any:
        """Return the answer, asking for less where a server refuses; None if it refuses everything."""
        body = {"model": self.model, "temperature": 0, "seed": seed} | body
        extras = {"logprobs": logprobs, "neutral": NEUTRAL}
        for number in range(self._accepted.get(path, 0), len(LESS)):
            asked = body | {key: value for name in sorted(LESS[number]) for key, value in extras[name].items()}
            try:
                found = self._client.post(f"/{path.partition(' ')[0]}", cast_to=object, body=asked)
            except self._openai.APIStatusError as error:
                if error.status_code not in UNKNOWN:
                    raise self._error(error) from None
                self.refused[path] = f"{error.status_code}: {_message(error)}"
                continue
            except self._openai.APIError as error:
                raise self._error(error) from None
            self._accepted[path] = number
            return found
        self._accepted.setdefault(path, len(LESS))  # it is not asked again; one that took others finds this one bad
        return None

    def _error(self, error: Any, remedy: str = "") -> ConfigError:
        """Return an error of the client as one of ours. It quotes the server, never the key."""
        where = f"--endpoint {self.url}"
        if isinstance(error, self._openai.APITimeoutError):
            return ConfigError(f"{where}: no answer in time; wait until the model is loaded, or raise --timeout")
        if isinstance(error, self._openai.APIConnectionError):
            reason = error.__cause__ or error
            return ConfigError(f"{where}: cannot be reached ({reason}); start the server, or name where it listens")
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            remedy = f"set the variable {KEY}, or name a file with --api_key_file"
        if status is not None and 300 <= status < 400:
            remedy = "name the place that it redirects to, which is not followed"
        return ConfigError(f"{where}: {status or 'no answer'}: {_message(error)}" + (f"; {remedy}" if remedy else ""))


def _library() -> ModuleType:
    """Return the client library. Raises ConfigError where it is not installed."""
    try:
        import openai
    except ImportError:
        raise ConfigError('verify needs the library openai: pip install "lora-alpaca[verify]"') from None
    return openai


def _base_url(url: str) -> str:
    """Return the URL below which the API lies: /v1 where no path is given."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"--endpoint {url}: no address of a server; write one as http://localhost:8000")
    if parts.username or parts.password:
        raise ConfigError(f"--endpoint: an address with a password in it; set the variable {KEY} instead")
    path = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(ending)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _only_ours(headers: Any, has_key: bool) -> None:
    """Take out of a request every header but those that it needs: what the client adds tells of this machine."""
    for name in list(headers):
        if name.lower() not in OURS or (name.lower() == "authorization" and not has_key):
            del headers[name]
    headers["user-agent"] = "lora_alpaca"


def _message(error: Any) -> str:
    """Return what a server says of an error, in a line."""
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, Mapping) else body
    text = (inner.get("message") or inner.get("detail") or inner) if isinstance(inner, Mapping) else inner
    return " ".join(str(text or getattr(error, "message", error)).split())[:200]


def _choice(found: Any) -> Mapping[str, Any]:
    choices = found.get("choices") if isinstance(found, Mapping) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}


def _reply(found: Any, choice: Mapping[str, Any], text: str) -> Reply:
    usage = found.get("usage") if isinstance(found, Mapping) else None
    counts = usage if isinstance(usage, Mapping) else {}
    prompt, completion = (
        number if isinstance(number := counts.get(name), int) else None
        for name in ("prompt_tokens", "completion_tokens")
    )
    return Reply(text, str(choice.get("finish_reason") or ""), _logprobs(choice.get("logprobs")), prompt, completion)


def _logprobs(given: Any) -> tuple[Said, ...]:
    """Return tokens with log-probabilities from either form: that of chats, and the older one of completions."""
    if not isinstance(given, Mapping):
        return ()
    if isinstance(content := given.get("content"), list):
        found = [(one.get("token"), one.get("logprob"), one.get("top_logprobs")) for one in content if one]
    else:
        tokens, values = given.get("tokens") or [], given.get("token_logprobs") or []
        tops = given.get("top_logprobs") or [None] * len(tokens)
        found = list(zip(tokens, values, tops, strict=False))
    known = [Said(str(token), value, _likeliest(top)) for token, value, top in found if isinstance(value, int | float)]
    return tuple(known) if len(known) == len(found) else ()


def _likeliest(top: Any) -> tuple[tuple[str, float], ...]:
    pairs = (
        top.items()
        if isinstance(top, Mapping)
        else [(one.get("token"), one.get("logprob")) for one in top or [] if isinstance(one, Mapping)]
    )
    return tuple((str(token), float(value)) for token, value in pairs if isinstance(value, int | float))


def key_of(file: str) -> str:
    """Return the key in a file, or in the environment, empty if there is none. It is never printed."""
    if not file:
        return os.environ.get(KEY, "")
    try:
        with open(os.path.expanduser(file), encoding="utf-8") as opened:
            return opened.read(10_000).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api_key_file {file}: {getattr(error, 'strerror', None) or 'is no text'}") from None
