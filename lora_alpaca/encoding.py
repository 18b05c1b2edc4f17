"""A conversation becomes token ids and labels, born together, with one boundary: where generation starts.

The ids of the prompt are made exactly as generation makes them, so they are a prefix of what training saw. The answer
is encoded on its own, as the continuation that it is: without the dummy space that SentencePiece puts before a text.
The end token is an id, never a text, and control strings typed by a user (`</s>`) are encoded as the text they are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation, Run, Template

IGNORED = -100  # the label of a token that is not learned, as torch's cross-entropy has it


@dataclass(frozen=True, slots=True)
class Example:
    """`input_ids` and `labels` of one row, of equal length; a label is the id at its own place, or -100."""

    input_ids: list[int]
    labels: list[int]

    def scored(self) -> int:
        """Return how many predictions this row is scored on: its labels, but for one on the very first token."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class Ledger:
    """What encoding did to the rows, to be printed before training and kept with the run."""

    rows: int = 0
    tokens: int = 0
    labels: int = 0
    truncated: list[str] = field(default_factory=list)  # where the rows stand
    without_label: list[str] = field(default_factory=list)

    def lines(self, cutoff_len: int) -> list[str]:
        """Return the sentences to print: what is trained on, then everything that was lost."""
        lines = [f"{self.rows} rows, {self.tokens:,} tokens, {self.labels:,} of them learned"]
        if self.truncated:
            share = len(self.truncated) / max(1, self.rows)
            lines.append(
                f"warning: {len(self.truncated)} rows ({share:.1%}) are longer than --cutoff_len {cutoff_len}; their "
                f"answers are cut and without an end token (first: {self.truncated[0]})"
            )
        if self.without_label:
            lines.append(
                f"warning: {len(self.without_label)} rows have a prompt of --cutoff_len {cutoff_len} or more, so no "
                f"answer is left; they are dropped (first: {self.without_label[0]})"
            )
        return lines


class TextEncoder:
    """Text to ids with a transformers tokenizer, as the beginning of a row or as a continuation."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.eos_id: int | None = tokenizer.eos_token_id
        self._bos = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._beginning = None if backend is None else _plain(json.loads(backend.to_str()))
        self._continuation = None if backend is None else _plain(_without_dummy_prefix(json.loads(backend.to_str())))

    def beginning(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that begin a row: what the tokenizer puts before every text, then the text."""
        if self._beginning is None:
            ids = [self._slow(text) for text in texts]
        else:
            ids = [found.ids for found in self._beginning.encode_batch(list(texts), add_special_tokens=False)]
        return [self._bos + row for row in ids]

    def continuation(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that follow others, without a beginning-of-text token or a dummy space."""
        if self._continuation is not None:
            return [found.ids for found in self._continuation.encode_batch(list(texts), add_special_tokens=False)]
        anchor = self._slow("\n")  # a tokenizer in Python cannot be told; it is shown a text that goes on instead
        return [self._slow("\n" + text)[len(anchor) :] for text in texts]

    def _slow(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _plain(state: dict[str, Any]) -> Any:
    """Return a `tokenizers.Tokenizer` from its JSON, which reads control strings in a text as text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(state))
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


class Encoder:
    """Conversations to examples, for one tokenizer, one template and one set of choices."""

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        cutoff_len: int,
        train_on_inputs: bool = False,
        add_eos_token: bool = True,
    ):
        self.text = TextEncoder(tokenizer)
        self.template = template
        self.cutoff_len = cutoff_len
        self.train_on_inputs = train_on_inputs
        self.add_eos_token = add_eos_token
        if add_eos_token and self.text.eos_id is None:
            raise DataError("the tokenizer has no end token to learn; pass --add_eos_token False to go without")

    def encode(self, conversations: Sequence[Conversation]) -> tuple[list[Example], Ledger]:
        """Return the examples in their order and the ledger of what was cut or dropped; DataError if none is left."""
        ledger, examples = Ledger(), []
        rendered = [self.template.render(conversation) for conversation in conversations]
        for conversation, example in zip(conversations, self._encode_runs(rendered), strict=True):
            cut = len(example.input_ids) > self.cutoff_len
            if cut:
                example = Example(example.input_ids[: self.cutoff_len], example.labels[: self.cutoff_len])
            if not example.scored():
                ledger.without_label.append(conversation.where)
                continue
            if cut:
                ledger.truncated.append(conversation.where)
            examples.append(example)
            ledger.rows += 1
            ledger.tokens += len(example.input_ids)
            ledger.labels += example.scored()
        if conversations and not examples:
            raise DataError(
                f"no row has anything to learn at --cutoff_len {self.cutoff_len}: "
                f"every prompt is as long (first: {ledger.without_label[0]})"
            )
        return examples, ledger

    def _encode_runs(self, rendered: Sequence[Sequence[Run]]) -> list[Example]:
        """Return one example a row: ids and labels of its runs, added together piece by piece."""
        firsts = iter(self.text.beginning([runs[0].text or "" for runs in rendered]))
        rests = iter(
            self.text.continuation([run.text for runs in rendered for run in runs[1:] if run.text is not None])
        )
        examples = []
        for runs in rendered:
            example = Example([], [])
            for place, run in enumerate(runs):
                if run.text is None:
                    ids = [self.text.eos_id] if self.add_eos_token and self.text.eos_id is not None else []
                else:
                    ids = next(rests) if place else next(firsts)
                example.input_ids.extend(ids)
                example.labels.extend(ids if run.learned or self.train_on_inputs else [IGNORED] * len(ids))
            examples.append(example)
        return examples
