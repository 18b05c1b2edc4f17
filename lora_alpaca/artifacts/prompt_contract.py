"""The prompt contract: which prompt a model was trained with, down to the token, in a file beside its weights.

`prompt_contract.json` holds the template, the identity of the tokenizer, the tokens that stop an answer, and a few
golden rows with their token ids. Generation and export encode the golden rows again, and refuse the model at the
first token that differs. The user's own rows are only hashed: an adapter is published, private rows are not.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Examples
from lora_alpaca.data.tokenization import hash_tokenizer
from lora_alpaca.errors import ContractError, TemplateError
from lora_alpaca.prompts import (
    EOS,
    AnyTemplate,
    ChatTemplate,
    Conversation,
    Message,
    load_template,
    template_from_json,
)
from lora_alpaca.storage.json_files import Count, Shape, read_json

FILE = "prompt_contract.json"
FORMAT = 1
HASHED_ROWS = 8

_USER, _ANSWER = "user", "assistant"
_CITY = {"type": "string", "description": "Name of a city."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "temperature",
        "description": "Return the temperature in a city.",
        "parameters": {"type": "object", "properties": {"city": _CITY}, "required": ["city"]},
    },
}
_CALL: dict[str, Any] = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "temperature", "arguments": {"city": "Cusco"}},
}
GOLDEN = (  # what has gone wrong before: inputs, white space at the seam, scripts, control strings, several turns
    Conversation.of("Name a mountain in Peru.", "", "Huascarán."),
    Conversation.of("Add the numbers.", "12 + 30", "42"),
    Conversation.of(" Write a list. ", "", "\n- one\n- two\n"),
    Conversation.of("Greet in three languages: {input}", "", " Hello, 你好, שלום 🦙"),
    Conversation.of("What does </s> mean, and <|im_end|>?", "", "### Response:\nBoth are </s> and <|im_end|>."),
    Conversation(
        (
            Message("system", "You are brief."),
            Message(_USER, "Hi."),
            Message(_ANSWER, "Hello!"),
            Message(_USER, "And now?"),
            Message(_ANSWER, "Bye."),
        )
    ),
    Conversation((Message(_USER, "How much is 6 * 7?"), Message(_ANSWER, "42", reasoning="Six sevens.\nThat is 42."))),
    Conversation(
        (
            Message(_USER, "Is it warm in Cusco?"),
            Message(_ANSWER, "", calls=(_CALL,)),
            Message("tool", '{"celsius": 12}', call_id=_CALL["id"], name="temperature"),
            Message(_ANSWER, "No, 12 °C."),
        ),
        tools=(_TOOL,),
    ),
)
_PLAIN_GOLDEN = 6  # the conversations of contracts that do not say how many they tried


class _Identity(Shape):
    sha256: str
    vocabulary_sha256: str
    special: dict[str, str | None]
    added: dict[str, Count]


class _Golden(Shape):
    text: str
    ids: list[Count]
    tokens: list[str]
    learned: list[list[Count]]


class _Content(Shape):
    format: Count
    template: dict[str, Any]
    template_sha256: str
    tokenizer: _Identity
    stop_ids: list[Count]
    golden: list[_Golden]


@dataclass(frozen=True)
class PromptContract:
    """The content of `prompt_contract.json`, and `where` it was read. `template` is not bound to a tokenizer yet."""

    template: AnyTemplate
    content: dict[str, Any]
    where: str

    def require_template(self, asked: str) -> AnyTemplate:
        """Return the template. Raises TemplateError if --prompt_template asks for another one."""
        if not asked or (asked == "chat" and isinstance(self.template, ChatTemplate)):
            return self.template
        if load_template(asked).digest() != self.template.digest():
            raise TemplateError(
                f"--prompt_template {asked}: {self.where} was trained with {self.template.name}, and {asked} is "
                "another prompt; leave the flag out"
            )
        return self.template

    def bind(self, tokenizer: Any) -> AnyTemplate:
        """Return the template bound to a tokenizer.

        Raises ContractError, naming the first token that differs, for a tokenizer that is not the one of training.
        """
        self._require_same_special_tokens(tokenizer)
        template = self.template.bound(tokenizer)
        now = _encode_golden(tokenizer, template, self.content.get("conversations", _PLAIN_GOLDEN))
        if "conversations" not in self.content:  # written by a version that refused some conversations taken today
            texts = {row["text"] for row in self.content["golden"]}
            now = [row for row in now if row["text"] in texts] if texts <= {row["text"] for row in now} else now
        for before, after in zip(self.content["golden"], now, strict=False):
            self._require_same_row(before, after)
        if len(now) != len(self.content["golden"]):
            raise ContractError(f"{self.where}: the template takes other conversations than in training")
        if template.digest() != self.content["template_sha256"]:
            raise ContractError(f"{self.where}: {FILE} holds another template than in training; {_REMEDY}")
        if _vocabulary_sha256(tokenizer) != self.content["tokenizer"]["vocabulary_sha256"]:
            raise ContractError(f"{self.where}: the tokenizer has another vocabulary than in training; {_REMEDY}")
        return template

    def _require_same_special_tokens(self, tokenizer: Any) -> None:
        """Raise ContractError at the first special or added token that was another one in training."""
        before, now = self.content["tokenizer"], _tokenizer_identity(tokenizer)
        for kind in ("special", "added"):
            for token in [*before[kind], *now[kind]]:
                was, is_now = before[kind].get(token), now[kind].get(token)
                chosen = token == "pad" and is_now is None  # by who loads it: it never reaches the model
                if was != is_now and not chosen:
                    raise ContractError(
                        f"{self.where}: the tokenizer's {kind} token {token!r} is {_named(is_now)}, and was "
                        f"{_named(was)} in training; {_REMEDY}"
                    )

    def _require_same_row(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Raise ContractError at the first token of a golden row that differs, and for different labels."""
        old, new = (list(zip(row["tokens"], row["ids"], strict=False)) for row in (before, after))
        position = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        if old != new:
            raise ContractError(
                f"{self.where}: token {position + 1} of a golden prompt is {_token(new, position)}, and was "
                f"{_token(old, position)} in training, after {before['text'][:24]!r}...; {_REMEDY}"
            )
        different = [key for key in before if before[key] != after.get(key)]
        if different:
            raise ContractError(f"{self.where}: a golden row has another {' and '.join(different)} than in training")


_REMEDY = "use the tokenizer and template of this folder unchanged, or train anew"


def build(
    tokenizer: Any, template: AnyTemplate, stop_ids: Sequence[int], train: Examples | None = None
) -> dict[str, Any]:
    """Return the content of a contract: the template, bound to its tokenizer, and hashes of the rows trained on."""
    return {
        "format": FORMAT,
        "template": template.to_json(),
        "template_sha256": template.digest(),
        "tokenizer": _tokenizer_identity(tokenizer),
        "stop_ids": list(stop_ids),
        "conversations": len(GOLDEN),
        "golden": _encode_golden(tokenizer, template),
        "rows_sha256": [] if train is None else row_hashes(train),
    }


def read(folder: Path) -> PromptContract | None:
    """Return the contract of a folder, None if it has none; ContractError if it is damaged."""
    path = folder / FILE
    if not path.exists():
        return None
    content = read_json(path)
    if wrong := _Content.what_is_wrong(content):
        raise ContractError(f"{path}: damaged, or not written by lora_alpaca ({wrong})")
    if content["format"] != FORMAT:
        raise ContractError(f"{path}: format {content['format']}, which this version of lora_alpaca cannot read")
    template = template_from_json(content["template"], "", str(path))
    return PromptContract(template, content, str(folder))


def row_hashes(train: Examples) -> list[str]:
    """Return the sha256 of the tokens and learned spans of a few rows, evenly spread."""
    step = max(1, len(train) // HASHED_ROWS)
    rows = [train[row] for row in range(0, len(train), step)[:HASHED_ROWS]]
    return [_sha256([row.ids.tolist(), row.spans]) for row in rows]


def _tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Return the identity of a tokenizer: special and added tokens with their ids, and hashes of the rest."""
    names = ("bos", "eos", "unk", "pad")
    return {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "sha256": hash_tokenizer(tokenizer),
        "vocabulary_sha256": _vocabulary_sha256(tokenizer),
        "special": {name: _described(tokenizer, getattr(tokenizer, f"{name}_token_id")) for name in names},
        "added": {token.content: number for number, token in tokenizer.added_tokens_decoder.items()},
    }


def _vocabulary_sha256(tokenizer: Any) -> str:
    """Return a hash of tokens, ids and merges that is the same in every version of the tokenizers library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    return _sha256([sorted(tokenizer.get_vocab().items()), model.get("merges")])


def _encode_golden(tokenizer: Any, template: AnyTemplate, count: int = len(GOLDEN)) -> list[dict[str, Any]]:
    """Return those of the first golden conversations that a template takes, encoded with it and the tokenizer."""
    encoder = Encoder.for_prompts(tokenizer, template)
    rows = []
    for conversation in GOLDEN[:count]:
        try:
            *_, encoded = encoder.encode([conversation])  # the last of several is the whole conversation
            *_, fragments = template.examples(conversation)
        except TemplateError:
            continue
        text = "".join(fragment.text for fragment in fragments)
        rows.append(
            {
                "text": text,
                "ids": encoded.ids.tolist(),
                "tokens": tokenizer.convert_ids_to_tokens(encoded.ids.tolist()),
                "learned": [list(span) for span in encoded.spans],
                "prompt_ids": len(encoder.prompt(conversation)),
            }
        )
    return rows


def stop_ids(model_ids: int | list[int] | None, tokenizer: Any, template: AnyTemplate) -> list[int]:
    """Return the ids that end an answer: the template's end token, the tokenizer's, and the model's own."""
    listed = model_ids if isinstance(model_ids, list) else [model_ids]
    own = None if template.stop == EOS else tokenizer.convert_tokens_to_ids(template.stop)
    return sorted({token for token in [own, tokenizer.eos_token_id, *listed] if token is not None})


def _described(tokenizer: Any, number: int | None) -> str | None:
    return None if number is None else f"{tokenizer.convert_ids_to_tokens(number)} (id {number})"


def _named(token: int | str | None) -> str:
    return "missing" if token is None else f"id {token}" if isinstance(token, int) else token


def _token(tokens: list[tuple[str, int]], position: int) -> str:
    return f"{tokens[position][0]!r} (id {tokens[position][1]})" if position < len(tokens) else "missing"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
