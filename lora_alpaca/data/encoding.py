"""A conversation becomes token ids and learned stretches, with one boundary: where generation starts.

The ids before an answer are made exactly as generation makes them, so they are a prefix of what training saw. The
answer is encoded on its own, as the continuation that it is. The end token is an id, never a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_alpaca.data.examples import Example, Span
from lora_alpaca.data.tokenization import TextEncoder
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import AnyTemplate, Conversation, Fragment, Template

_WINDOW = 20  # characters on either side of a seam; what is farther away does not bear on whether they melt


@dataclass(frozen=True, slots=True)
class Encoded:
    """The ids of a row, its learned stretches, and the places of the end tokens among them."""

    ids: list[int]
    spans: list[Span]
    ends: list[int]

    def example(self) -> Example:
        """Return the row as training has it."""
        return Example(
            self.ids, [token if learned else -100 for token, learned in zip(self.ids, self.mask(), strict=True)]
        )

    def mask(self) -> list[bool]:
        """Return for every token whether it is learned."""
        learned = [False] * len(self.ids)
        for first, last in self.spans:
            learned[first:last] = [True] * (last - first)
        return learned

    def scored(self) -> int:
        """Return how many predictions are scored: the learned tokens, but for one on the very first place."""
        return sum(last - max(first, 1) for first, last in self.spans)

    def cut(self, length: int) -> "Encoded":
        """Return the first `length` tokens, without a prompt at the end whose answer is gone."""
        spans = [(first, min(last, length)) for first, last in self.spans if first < length]
        length = spans[-1][1] if spans else length
        return Encoded(self.ids[:length], spans, [end for end in self.ends if end < length])


class Encoder:
    """Conversations to ids, for one tokenizer, one template bound to it, and one set of choices."""

    def __init__(
        self,
        tokenizer: Any,
        template: AnyTemplate,
        cutoff_len: int = 512,
        train_on_inputs: bool = False,
        add_eos_token: bool = True,
        train_on: str = "all",
    ):
        self.text = TextEncoder(tokenizer)
        self.template = template
        self.cutoff_len = cutoff_len
        self.train_on_inputs = train_on_inputs
        self.add_eos_token = add_eos_token
        self.last_only = train_on == "last"
        self._begin = 0 if template.begins_itself else len(self.text.bos)  # where the first fragment stands
        self._seams: dict[tuple[str, str], bool] = {}
        if self.text.eos_id is None and add_eos_token:
            raise DataError("the tokenizer has no end token to learn; pass --add_eos_token False to go without")

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Return every row as it is before anything is cut."""
        rows = [self._fragments(conversation) for conversation in conversations]
        ids = self.text.fragments(rows, self.template.begins_itself)
        return [self._put_together(fragments, parts) for fragments, parts in zip(rows, ids, strict=True)]

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids that generation is fed: a prefix of what `encode` gives for the same row with an answer."""
        return self.text.prompt(self.template.prompt(conversation), self.template.begins_itself)

    def _fragments(self, conversation: Conversation) -> list[Fragment]:
        fragments = self.template.render(conversation, self.last_only)
        if not self.add_eos_token:  # the ends of earlier turns stay, as part of what follows
            last = max(
                (number for number, fragment in enumerate(fragments) if fragment.control and fragment.learned),
                default=len(fragments),
            )
            fragments = [
                fragment._replace(learned=fragment.learned and not fragment.control) for fragment in fragments[:last]
            ]
        return fragments

    def _put_together(self, fragments: Sequence[Fragment], parts: Sequence[Sequence[int]]) -> Encoded:
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
        return Encoded(
            ids, [(0, len(ids))] if self.train_on_inputs else [span for span in spans if span[0] < span[1]], ends
        )

    # ------------------------------------------------------------------------------- what alpaca-lora would have had

    def other_ids(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Return for every row whether alpaca-lora's ids are others, because it encodes prompt and answer as one text.

        Only what stands around the seam can differ, so only that is encoded. For templates that it does not have,
        nothing differs.
        """
        template = self.template
        if not isinstance(template, Template) or not template.is_upstreams:
            return [False] * len(conversations)
        seams = [(_tail(template, row)[-_WINDOW:], row.answers[0][: _WINDOW // 2]) for row in conversations]
        new = sorted(set(seams) - self._seams.keys())
        joint = self.text.encode([tail + answer for tail, answer in new], "first")
        answers = self.text.encode([answer for _, answer in new], "continuation")
        tails = sorted({tail for tail, _ in new})
        before = dict(zip(tails, self.text.encode(tails, "first"), strict=True))
        found = {seam: whole != before[seam[0]] + part for seam, whole, part in zip(new, joint, answers, strict=True)}
        if len(self._seams) < 100_000:
            self._seams |= found
        return [found[seam] if seam in found else self._seams[seam] for seam in seams]


def _tail(template: Template, row: Conversation) -> str:
    """Return the text right before the answer: what the template always puts there, or else all that precedes it."""
    always = template.tail and (not row.question.input or template.prompt_input.endswith(template.tail))
    return template.tail if always else template.prompt(row)[-1].text
