"""A conversation becomes token ids and learned spans, with one boundary: where generation starts.

The ids before an answer are made exactly as generation makes them, so they are a prefix of what training saw. The
answer is encoded on its own, as the continuation that it is. The end token is an id, never a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from lora_alpaca.config.shared import DataOptions
from lora_alpaca.data.examples import Example, Span
from lora_alpaca.data.tokenization import TextEncoder
from lora_alpaca.errors import DataError
from lora_alpaca.models.special_tokens import surplus
from lora_alpaca.prompts import AnyTemplate, Conversation, Fragment


@dataclass(frozen=True)
class Choices:
    """What shapes the ids of a row besides tokenizer and template: data options, under their own names."""

    cutoff_len: int = 512
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    train_on_inputs: bool = False
    train_on: Literal["all", "last"] = "all"
    train_on_reasoning: bool = True
    add_eos_token: bool = True


class Encoder:
    """Conversations to examples, for one tokenizer, one template bound to it, and one set of choices.

    `Encoder.from_options` makes the one that a command asks for, `Encoder.for_prompts` one for prompts alone.
    """

    def __init__(self, tokenizer: Any, template: AnyTemplate, choices: Choices, vocabulary: int | None = None):
        self.vocabulary = vocabulary  # the number of tokens that the model has, where that is known
        self._surplus = vocabulary is not None and bool(surplus(tokenizer, vocabulary))
        self.text = TextEncoder(tokenizer)
        self.template = template
        self.choices = choices
        self._begin = 0 if template.begins_itself else len(self.text.bos)  # position of the first fragment
        if self.text.eos_id is None and choices.add_eos_token:
            raise DataError("the tokenizer has no end token to learn; pass --add_eos_token False to go without")

    @classmethod
    def from_options(
        cls, tokenizer: Any, template: AnyTemplate, options: DataOptions, vocabulary: int | None = None
    ) -> "Encoder":
        """Return the encoder that the data options of a command ask for, for a model of so many tokens."""
        choices = Choices(**{name.name: getattr(options, name.name) for name in fields(Choices)})
        return cls(tokenizer, template, choices, vocabulary)

    @classmethod
    def for_prompts(cls, tokenizer: Any, template: AnyTemplate, vocabulary: int | None = None) -> "Encoder":
        """Return an encoder for prompts and golden rows; it learns the end token where the tokenizer has one."""
        return cls(tokenizer, template, Choices(add_eos_token=tokenizer.eos_token_id is not None), vocabulary)

    def encode(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Return the examples of some conversations, uncut, in order; see `encode_rows`."""
        return [example for examples in self.encode_rows(conversations) for example in examples]

    def encode_rows(self, conversations: Sequence[Conversation]) -> list[list[Example]]:
        """Return the examples of each conversation, uncut: one, none where nothing is to be learned, or several.

        Several are those of a chat template that shows earlier answers otherwise than they were generated. Raises
        TemplateError for a conversation that the template cannot hold, DataError for one with a token that the model
        does not have.
        """
        for conversation in conversations:
            self.template.check(conversation)
        rows = [self._fragments(conversation) for conversation in conversations]
        flat = [fragments for examples in rows for fragments in examples]
        ids = self.text.fragments(flat, self.template.begins_itself)
        encoded = iter([self._joined(fragments, parts) for fragments, parts in zip(flat, ids, strict=True)])
        found = [[next(encoded) for _ in examples] for examples in rows]
        if self._surplus:
            for conversation, examples in zip(conversations, found, strict=True):
                for example in examples:
                    self._require_known(conversation.where, example.ids.tolist())
        return found

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids that generation is fed: a prefix of what `encode` gives for the same row with an answer.

        Raises TemplateError for a conversation that the template cannot hold.
        """
        self.template.check(conversation)
        ids = self.text.prompt(self.template.prompt(conversation), self.template.begins_itself)
        if self._surplus:
            self._require_known(conversation.where or "the prompt", ids)
        return ids

    def _require_known(self, where: str, ids: Sequence[int]) -> None:
        """Raise DataError at the first token that the tokenizer has and the model has not."""
        assert self.vocabulary is not None
        for token in (token for token in ids if token >= self.vocabulary):
            raise DataError(
                f"{where}: {self.text.pieces([token])[0]!r} (id {token}) is a token of the tokenizer that the model "
                f"does not have, which knows {self.vocabulary}; leave it out of row and template, or take the model "
                "that belongs to this tokenizer"
            )

    def _fragments(self, conversation: Conversation) -> list[list[Fragment]]:
        if self.choices.train_on == "last":
            conversation = conversation.learning(set(conversation.learned[-1:]))
        examples = self.template.examples(conversation, self.choices.train_on_reasoning)
        return examples if self.choices.add_eos_token else [_without_end(fragments) for fragments in examples]

    def _joined(self, fragments: Sequence[Fragment], parts: Sequence[Sequence[int]]) -> Example:
        ids: list[int] = []
        spans: list[Span] = []
        ends: list[int] = []
        for fragment, part, following in zip(fragments, parts, [*fragments[1:], None], strict=True):
            first = len(ids) or self._begin
            ids.extend(part)
            if not fragment.learned:
                continue
            if fragment.control and not (following and following.learned):
                ends.append(first)
            if fragment.seen:
                first += self.text.tokens_before(fragment.text, fragment.seen)
            if spans and spans[-1][1] == first:
                first = spans.pop()[0]
            spans.append((first, len(ids)))
        if self.choices.train_on_inputs:
            spans = [(0, len(ids))]
        return Example(np.array(ids, np.int32), [span for span in spans if span[0] < span[1]], ends)


def _without_end(fragments: list[Fragment]) -> list[Fragment]:
    """Return an example without its last end token; the ends of earlier turns stay, as part of what follows."""
    last = max(
        (number for number, fragment in enumerate(fragments) if fragment.control and fragment.learned),
        default=len(fragments),
    )
    return [fragment._replace(learned=fragment.learned and not fragment.control) for fragment in fragments[:last]]
