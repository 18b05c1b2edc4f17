"""Text to token ids with a transformers tokenizer, by the position of the text in its row.

A text that begins a row gets the dummy space of SentencePiece, a continuation does not; after a control token the
tokenizer's own habit decides. Control strings typed by a user (`</s>`) are always encoded as text.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, Literal

from lora_alpaca.data.detokenization import IncrementalDecoder
from lora_alpaca.errors import ModelError, TemplateError
from lora_alpaca.prompts import EOS, Fragment

Position = Literal["first", "after_token", "continuation"]


class TextEncoder:
    """Texts and control tokens to ids. `bos` are the ids that the tokenizer puts before every text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        self.bos: list[int] = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1]
        state = _backend_state(tokenizer)
        continuing = _without_dummy_prefix(state)
        same = continuing == state
        self._first = _plain(state)
        self._continuation = self._first if same else _plain(continuing)

    def encode(self, texts: Sequence[str], position: Position) -> list[list[int]]:
        """Return the ids of texts that are all in one position of their rows, without control tokens around them."""
        if position == "after_token":
            position = self._after_token
        backend = self._first if position == "first" else self._continuation
        return [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def token_id(self, control: str) -> int:
        """Return the id of a control token by its name; `EOS` is the end token. TemplateError if there is none."""
        number: int | None = self.eos_id if control == EOS else self._tokenizer.convert_tokens_to_ids(control)
        if number is None:
            raise TemplateError(
                "the template puts the end token behind every answer, and the tokenizer has none; take a template of "
                "one turn, such as alpaca"
            )
        return number

    def fragments(self, rows: Sequence[Sequence[Fragment]], begins_itself: bool = False) -> list[list[list[int]]]:
        """Return the ids of every fragment of every row; the first begins with the beginning-of-text token."""
        texts: dict[Position, list[str]] = {"first": [], "after_token": [], "continuation": []}
        positioned = [_positions(fragments, self._swallows) for fragments in rows]
        for row in positioned:
            for position, text in row:
                if position != "control":
                    texts[position].append(text)
        encoded = {position: iter(self.encode(found, position)) for position, found in texts.items()}
        bos = [] if begins_itself else self.bos
        ids = [
            [[self.token_id(text)] if position == "control" else next(encoded[position]) for position, text in row]
            for row in positioned
        ]
        return [[bos + row[0], *row[1:]] if row else [] for row in ids]

    def prompt(self, fragments: Sequence[Fragment], begins_itself: bool = False) -> list[int]:
        """Return the ids that generation is fed."""
        return [token for ids in self.fragments([fragments], begins_itself)[0] for token in ids] or list(self.bos)

    def tokens_before(self, answer: str, characters: int) -> int:
        """Return how many tokens of an answer, which is encoded as a continuation, lie in its first characters."""
        found = self._continuation.encode(answer, add_special_tokens=False)
        return sum(end <= characters for _, end in found.offsets)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of every token, control tokens by name; joined, they are the decoded row.

        A token that holds part of a character has an empty text, and the last part the character.
        """
        decoder = IncrementalDecoder(self._decoded)
        pieces = [decoder.add(token) for token in ids]
        if pieces:
            pieces[-1] += decoder.flush()
        return pieces

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Return the control tokens by name: those that a text must not turn into."""
        return {
            token.content: number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Return a pattern that finds control tokens typed in a text."""
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _swallows(self) -> dict[str, tuple[bool, bool]]:
        """Return for control tokens that take the white space before or after them along: (before, after)."""
        tokens = self._tokenizer.added_tokens_decoder.values()
        return {token.content: (token.lstrip, token.rstrip) for token in tokens if token.lstrip or token.rstrip}

    @cached_property
    def _after_token(self) -> Position:
        """Return whether a text behind a control token is encoded like a first one, found out by trying."""
        for token, number in self.control_tokens.items():
            ids = self._tokenizer(token + "a", add_special_tokens=False)["input_ids"]
            if ids and ids[0] == number and not any(self._swallows.get(token, ())):
                return "first" if ids[1:] != self.encode(["a"], "continuation")[0] else "continuation"
        return "continuation"


def _positions(fragments: Sequence[Fragment], swallows: dict[str, tuple[bool, bool]]) -> list[tuple[Any, str]]:
    """Return (position, text) of every fragment; the position of a control token is `control`."""
    positions: list[tuple[Any, str]] = []
    after_token = False
    for number, fragment in enumerate(fragments):
        if fragment.control:
            positions.append(("control", fragment.text))
            after_token = True
            continue
        text = fragment.text
        if swallows and not fragment.answer:  # which is kept as it is
            if after_token and swallows.get(fragments[number - 1].text, (False, False))[1]:
                text = text.lstrip()
            following = fragments[number + 1] if number + 1 < len(fragments) else None
            if following and following.control and swallows.get(following.text, (False, False))[0]:
                text = text.rstrip()
        positions.append(("first" if not number else "after_token" if after_token else "continuation", text))
        after_token = after_token and not text
    return positions


def hash_tokenizer(tokenizer: Any) -> str:
    """Return a sha256 of what turns text into ids: vocabulary, added tokens, merges and normalisation."""
    state = _backend_state(tokenizer)
    for passing in ("truncation", "padding", "version"):
        state.pop(passing, None)
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("")["input_ids"]]
    return hashlib.sha256(json.dumps([state, ends], sort_keys=True).encode()).hexdigest()


def reads_same(one: Any, other: Any) -> bool:
    """Return whether two tokenizers turn every text into the same ids, and have the same special tokens."""

    def identity(tokenizer: Any) -> list[Any]:
        names = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")]
        _, _, state = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')  # behind padding and cutting
        return [*names, tokenizer("")["input_ids"], state]

    return identity(one) == identity(other)


def tokenizer_json(tokenizer: Any) -> bytes:
    """Return the content of a `tokenizer.json` that reads text as a tokenizer does. Raises ModelError as above."""
    state = _backend_state(tokenizer) | {"truncation": None, "padding": None}
    return (json.dumps(state, indent=2, ensure_ascii=False) + "\n").encode()


def prepends(tokenizer: Any) -> str:
    """Return which texts a tokenizer of SentencePiece puts a space before, `first`, `always` or `never`, or nothing."""
    pre = _backend_state(tokenizer).get("pre_tokenizer") or {}
    return str(pre.get("prepend_scheme", ""))


def reads_alike(tokenizer: Any, content: bytes, texts: Sequence[str]) -> bool:
    """Return whether a `tokenizer.json`, taken as it stands, reads texts with control tokens as a tokenizer does."""
    from tokenizers import Tokenizer

    try:
        plain = Tokenizer.from_str(content.decode())
    except Exception:  # tokenizers has no type of its own for what does not hang together
        return False
    plain.no_truncation()
    plain.no_padding()
    found = [one.ids for one in plain.encode_batch(list(texts), add_special_tokens=False)]
    return found == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _backend_state(tokenizer: Any) -> dict[str, Any]:
    """Return the JSON of what encodes in a tokenizer. ModelError for one written in Python, which has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        name = type(tokenizer).__name__
        raise ModelError(f"the tokenizer {name} is written in Python and has no tokenizer.json; use another base model")
    state: dict[str, Any] = json.loads(backend.to_str())
    return state


def _plain(state: dict[str, Any]) -> Any:
    """Return a `tokenizers.Tokenizer` from its JSON, which reads control strings in a text as text."""
    from tokenizers import Tokenizer

    if state["model"]["type"] == "Unigram":  # finds `</s>` in a text, for it is one of its pieces: call that otherwise
        for token in filter(itemgetter("special"), state["added_tokens"]):
            if token["id"] < len(state["model"]["vocab"]):
                token["content"] = state["model"]["vocab"][token["id"]][0] = f"\0 {token['id']} \0"
    try:
        tokenizer = Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # tokenizers has no type of its own for what does not hang together
        raise ModelError(f"tokenizer.json: {error}; copy or download the model again") from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_dummy_prefix(state: Any) -> Any:
    """Return the JSON of a tokenizer with the parts switched off that put a space before every text."""
    if isinstance(state, list):
        return [_without_dummy_prefix(part) for part in state if not _is_prepend(part)]
    if not isinstance(state, dict):
        return state
    state = {key: value if key == "model" else _without_dummy_prefix(value) for key, value in state.items()}
    if state.get("type") == "Metaspace":
        state["prepend_scheme"] = "never"
    if state.get("type") == "ByteLevel":
        state["add_prefix_space"] = False
    if _is_prepend(state.get("normalizer")):
        state["normalizer"] = None
    return state


def _is_prepend(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "Prepend"
