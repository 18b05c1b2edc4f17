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
from lora_alpaca.prompts import AnyTemplate, Conversation, Fragment


@dataclass(frozen=True)
class Choices:
    """What shapes the ids of a row besides tokenizer and template: data options, under their own names."""

    cutoff_len: int = 512
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    train_on_inputs: bool = False
    train_on: Literal["all", "last"] = "all"
    add_eos_token: bool = True


class Encoder:
    """Conversations to examples, for one tokenizer, one template bound to it, and one set of choices.

    `Encoder.from_options` makes the one that a command asks for, `Encoder.for_prompts` one for prompts alone.
    """

    def __init__(self, tokenizer: Any, template: AnyTemplate, choices: Choices):
        self.text = TextEncoder(tokenizer)
        self.template = template
        self.choices = choices
        self._begin = 0 if template.begins_itself else len(self.text.bos)  # position of the first fragment
        if self.text.eos_id is None and choices.add_eos_token:
            raise DataError("the tokenizer has no end token to learn; pass --add_eos_token False to go without")

    @classmethod
    def from_options(cls, tokenizer: Any, template: AnyTemplate, options: DataOptions) -> "Encoder":
        """Return the encoder that the data options of a command ask for."""
        return cls(tokenizer, template, Choices(**{name.name: getattr(options, name.name) for name in fields(Choices)}))

    @classmethod
    def for_prompts(cls, tokenizer: Any, template: AnyTemplate) -> "Encoder":
        """Return an encoder for prompts and golden rows; it learns the end token where the tokenizer has one."""
        return cls(tokenizer, template, Choices(add_eos_token=tokenizer.eos_token_id is not None))

    def encode(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Return every row, uncut. Raises TemplateError for a conversation that the template cannot hold."""
        for conversation in conversations:
            self.template.check(conversation)
        rows = [self._fragments(conversation) for conversation in conversations]
        ids = self.text.fragments(rows, self.template.begins_itself)
        return [self._joined(fragments, parts) for fragments, parts in zip(rows, ids, strict=True)]

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids that generation is fed: a prefix of what `encode` gives for the same row with an answer.

        Raises TemplateError for a conversation that the template cannot hold.
        """
        self.template.check(conversation)
        return self.text.prompt(self.template.prompt(conversation), self.template.begins_itself)

    def _fragments(self, conversation: Conversation) -> list[Fragment]:
        fragments = self.template.render(conversation, self.choices.train_on == "last")
        if not self.choices.add_eos_token:  # the ends of earlier turns stay, as part of what follows
            last = max(
                (number for number, fragment in enumerate(fragments) if fragment.control and fragment.learned),
                default=len(fragments),
            )
            fragments = [
                fragment._replace(learned=fragment.learned and not fragment.control) for fragment in fragments[:last]
            ]
        return fragments

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
            if spans and spans[-1][1] == first:
                first = spans.pop()[0]
            spans.append((first, len(ids)))
        if self.choices.train_on_inputs:
            spans = [(0, len(ids))]
        return Example(np.array(ids, np.int32), [span for span in spans if span[0] < span[1]], ends)
