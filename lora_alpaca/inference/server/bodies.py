"""What may be asked: the parameters of OpenAI's two endpoints, and of other servers, and what each means here.

A parameter that would change the answer and has no meaning here is refused by name; one that would not is ignored. Null
is the same as absent. What is absent has the value of the command line.
"""

import difflib
import hashlib
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_alpaca.inference.server.api_error import ApiError

MOST_CHOICES = 128
IGNORED = {  # they change nothing in the answer
    *("user", "safety_identifier", "metadata", "store", "request_id"),  # who asks, and what is kept
    *("service_tier", "priority", "prompt_cache_key", "prompt_cache_retention", "cache_prompt", "prediction"),  # speed
    "parallel_tool_calls",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # what means as much as nothing, of parameters that are not supported
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "functions": ([],),
    "reasoning_effort": ("none",),
    "skip_special_tokens": (True,),
    "add_special_tokens": (True,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")  # as in Sampling


class StreamOptions(BaseModel):
    """What is streamed besides the answer."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against observers of a network: ignored


class Body(BaseModel):
    """The parameters that both endpoints have."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] = Field(default_factory=dict)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """Return the body that a JSON object is. Raises ApiError 400 that names the parameter."""
        given = {name: value for name, value in given.items() if value is not None}
        try:
            body = cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = _place(first["loc"])
            raise ApiError(400, f"{place}: {first['msg']}", param=place or None) from None
        for name, value in (body.model_extra or {}).items():
            if name not in IGNORED and not any(_same(value, neutral) for neutral in _NEUTRAL.get(name, ())):
                raise _unknown(name, [*cls.model_fields])
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options goes with stream: true", param="stream_options")
        return body

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def length(self) -> tuple[str, int | None]:
        """Return the most new tokens, None for all that the context has left, and the parameter that says so."""
        return "max_tokens", self.max_tokens

    def sampling(self, choice: int, vocabulary: int) -> dict[str, Any]:
        """Return the fields of Sampling that the body changes, for one of its choices."""
        changes = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        changes["max_new_tokens"] = self.length[1]
        penalties = {value for value in (self.repetition_penalty, self.repeat_penalty) if value is not None}
        if len(penalties) > 1:
            raise ApiError(400, "repetition_penalty and repeat_penalty are one thing, and differ", "repeat_penalty")
        if penalties:
            changes["repetition_penalty"] = penalties.pop()
        if self.stop is not None:
            changes["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.seed is not None:
            changes["seed"] = _seed(self.seed, choice)
        if self.logit_bias:
            changes["logit_bias"] = _bias(self.logit_bias, vocabulary)
        return changes


class CompletionBody(Body):
    """The parameters of `/v1/completions`: a text, or ids, to go on with."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, of which each is answered `n` times."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given


class Part(BaseModel):
    """A part of a message's content. Only text can be one."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: str = "text"
    text: str | None = None


class ChatMessage(BaseModel):
    """A message, as clients write it and as the API itself gives it back."""

    model_config = ConfigDict(strict=True, extra="allow")
    SILENT: ClassVar = frozenset(("refusal", "audio", "annotations", "function_call"))  # where they are empty
    role: str
    content: str | list[Part] | None = None
    input: str | None = None  # Alpaca's second text of a question
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class ResponseFormat(BaseModel):
    """What the text of an answer has to be."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class ChatBody(Body):
    """The parameters of `/v1/chat/completions`: messages to be answered."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None

    @property
    def length(self) -> tuple[str, int | None]:
        """Return the most new tokens by either of its names."""
        if self.max_completion_tokens is None:
            return super().length
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens are one thing, and differ", "max_tokens")
        return "max_completion_tokens", self.max_completion_tokens


def _place(path: tuple[int | str, ...]) -> str:
    """Return the place of an error, such as `messages[0].content`; what pydantic calls the kinds of a union is none."""
    place = ""
    for step in path:
        if isinstance(step, int):
            place += f"[{step}]"
        elif step.isidentifier() and step not in ("str", "int", "float", "bool", "Part"):
            place += f".{step}" if place else step
    return place


def _same(value: Any, neutral: Any) -> bool:
    return type(value) is type(neutral) and value == neutral


def _unknown(name: str, known: list[str]) -> ApiError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ApiError(
        400, f"{name[:80]}: not a parameter that has a meaning here{hint}", name[:80], "unsupported_parameter"
    )


def _seed(seed: int, choice: int) -> int:
    """Return the seed of a choice: that of the first is the request's own."""
    if choice == 0:
        return seed % 2**63
    return int.from_bytes(hashlib.sha256(f"{seed} {choice}".encode()).digest()[:7], "big")


def _bias(given: dict[str, float], vocabulary: int) -> dict[int, float]:
    bias = {}
    for token, value in given.items():
        number = int(token) if token.isascii() and token.isdecimal() and len(token) < 10 else -1
        if not 0 <= number < vocabulary:
            raise ApiError(
                400, f"logit_bias: {token[:40]!r} is not the id of a token; there are {vocabulary}", "logit_bias"
            )
        if not -100 <= value <= 100:
            raise ApiError(400, f"logit_bias: {value} is not between -100 and 100", "logit_bias")
        bias[number] = float(value)
    return bias
