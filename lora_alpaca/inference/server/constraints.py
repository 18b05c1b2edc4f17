"""Answers that are JSON, of a schema or of any: what of the vocabulary may come next, by llguidance."""

import json
import threading
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from lora_alpaca.inference.codec import Codec
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.inference.server.bodies import ResponseFormat
from lora_alpaca.inference.server.tool_calls import ToolForm
from lora_alpaca.prompts import Fragment

# JSON on one line, as json.dumps writes it: a model that may write white space may never write anything else
_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST_CALLS = 16  # in an answer that has to call
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Grammars:
    """Makes constraints for the tokenizers of codecs, each of which is read once."""

    def __init__(self) -> None:
        self._tokenizers: dict[int, LLTokenizer] = {}
        self._lock = threading.Lock()

    def of_format(self, asked: ResponseFormat | None, codec: Codec) -> "GrammarConstraint | None":
        """Return what a response format asks for, None for text. Raises ApiError 400 for a schema that cannot be."""
        if asked is None or asked.type == "text":
            return None
        schema: Any = ANY_OBJECT
        if asked.type == "json_schema":
            schema = (asked.json_schema or {}).get("schema")
            if not isinstance(schema, dict):
                raise ApiError(400, "response_format: json_schema needs a schema, an object", "response_format")
        return self.of_schema(schema, codec)

    def of_schema(self, schema: dict[str, Any], codec: Codec) -> "GrammarConstraint":
        """Return a constraint to JSON of a schema. Raises ApiError 400."""
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_STYLE)
        return self._constraint(grammar, codec, "response_format")

    def of_calls(self, form: ToolForm, functions: list[dict[str, Any]], codec: Codec) -> "GrammarConstraint":
        """Return a constraint to calls of some functions, in the form of the template. Raises ApiError 400."""
        schema: dict[str, Any] = {"anyOf": [_call_schema(form, function) for function in functions]}
        if form.in_list:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": MOST_CALLS}
        before, after = (
            " ".join(_terminal(fragment, codec) for fragment in part) for part in (form.before, form.after)
        )
        grammar = f"start: {before} call {after}\ncall: %json {json.dumps({'x-guidance': _STYLE} | schema)}\n"
        return self._constraint(LLMatcher.grammar_from_lark(grammar), codec, "tools")

    def _constraint(self, grammar: str, codec: Codec, param: str) -> "GrammarConstraint":
        matcher = LLMatcher(self._tokenizer(codec), grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0]
            raise ApiError(400, f"{param}: this schema cannot be followed: {reason}", param)
        return GrammarConstraint(matcher, codec.vocabulary)

    def _tokenizer(self, codec: Codec) -> LLTokenizer:
        with self._lock:
            key = id(codec.tokenizer)
            if key not in self._tokenizers:
                self._tokenizers[key] = from_tokenizer(
                    codec.tokenizer, n_vocab=codec.vocabulary, eos_token=list(codec.stop_ids)
                )
            return self._tokenizers[key]


def _terminal(fragment: Fragment, codec: Codec) -> str:
    """Return what stands for a text or a control token in a grammar."""
    if fragment.control:
        return f"<[{codec.tokenizer.convert_tokens_to_ids(fragment.text)}]>"
    return json.dumps(fragment.text) if fragment.text else ""


def _call_schema(form: ToolForm, function: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a call of a function, its keys in the order of the template."""
    values = {key: {"const": value} for key, value in form.call.items()}
    values[form.name_key] = {"const": function["name"]}
    values[form.arguments_key] = {"type": "object"} | (function.get("parameters") or {})
    return {"type": "object", "properties": values, "required": list(values), "additionalProperties": False}


class GrammarConstraint:
    """The place in a grammar that an answer has come to."""

    def __init__(self, matcher: LLMatcher, vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = torch.zeros((vocabulary + 31) // 32, dtype=torch.int32)

    def allowed(self) -> torch.Tensor:
        """Return which tokens may come next, bool [vocabulary]."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.numel() * 4)
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar of the answer: {self._matcher.get_error()}")
        mask = (self._bits[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
        return mask.flatten()[: self._vocabulary].bool()

    def accept(self, token: int) -> None:
        """Take note of the token that came."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
