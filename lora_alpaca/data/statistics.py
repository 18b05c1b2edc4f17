"""Counts of what happened to the rows, and sentences about them: printed before training, and kept with the run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lora_alpaca.errors import DataError

NAMED = 5  # rows of a kind that are named, of however many


@dataclass
class Count:
    """How many rows of a kind there are, where the first ones are, and an example or the reason of the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    example: str = ""

    def add(self, where: str, example: str = "") -> None:
        """Count a row."""
        self.count += 1
        self.example = self.example or example
        if len(self.first) < NAMED:
            self.first.append(where)


SENTENCES = {  # by field, in the order in which they are printed
    "bad": "cannot be used and are dropped",
    "overlong": "are longer than --cutoff_len {cutoff_len} and are dropped",
    "without_label": "have a prompt of --cutoff_len {cutoff_len} or more, so no answer is left; they are dropped",
    "truncated": "are longer than --cutoff_len {cutoff_len}; they are cut, in an answer or behind one",
    "ends_lost": "lose the end token of an answer in that",
    "duplicates": "are exact doubles of an earlier one",
    "shared": "are in both the training and the validation part",
    "empty_answers": "have an empty answer: they teach to say nothing",
    "blank_instructions": "have a blank instruction",
    "unlearned": "have no answer to learn (weight 0, train false); they are dropped",
}
NOTES = {  # not amiss, but good to know
    "only_seen": "have answers that are seen, not learned (weight 0, train false)",
    "turn_by_turn": "become an example for each turn, since the chat template rewrites earlier ones",
    "control_text": "hold control tokens as text (like {example}); they stay text",
}
FORMER = {"other_ids", "last_turn_only"}  # counts of earlier versions, which saved statistics may hold


@dataclass
class Statistics:
    """Counts of a run's rows. Tokens are those of the training part, after truncation."""

    cutoff_len: int
    read: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    train: int = 0
    validation: int = 0
    tokens: int = 0
    learned: int = 0
    percentiles: dict[str, int] = field(default_factory=dict)  # of row lengths before truncation
    bad: Count = field(default_factory=Count)
    overlong: Count = field(default_factory=Count)
    without_label: Count = field(default_factory=Count)
    truncated: Count = field(default_factory=Count)
    ends_lost: Count = field(default_factory=Count)
    duplicates: Count = field(default_factory=Count)
    shared: Count = field(default_factory=Count)
    empty_answers: Count = field(default_factory=Count)
    blank_instructions: Count = field(default_factory=Count)
    unlearned: Count = field(default_factory=Count)
    only_seen: Count = field(default_factory=Count)
    turn_by_turn: Count = field(default_factory=Count)
    control_text: Count = field(default_factory=Count)

    def lines(self) -> list[str]:
        """Return the sentences to print: what is trained on, what was lost, and what is good to know."""
        kinds = ", ".join(f"{count:,} in {name} format" for name, count in self.formats.items())
        masked = self.tokens - self.learned
        lengths = ", ".join(f"{name} {length}" for name, length in self.percentiles.items())
        lines = [
            f"{self.read:,} rows read ({kinds}); {self.train:,} to train on, {self.validation:,} to validate on",
            f"{self.tokens:,} tokens, {self.learned:,} of them learned, {masked:,} only seen; row lengths: {lengths}",
        ]
        for key, sentence in SENTENCES.items():
            lines += self._line("warning: ", key, sentence)
        for key, sentence in NOTES.items():
            lines += self._line("", key, sentence)
        return lines

    def _line(self, mark: str, key: str, sentence: str) -> list[str]:
        found: Count = getattr(self, key)
        if not found.count:
            return []
        text = sentence.format(cutoff_len=self.cutoff_len, example=found.example)
        why = f": {found.example}" if key == "bad" else ""
        share = found.count / max(1, self.read)
        return [f"{mark}{found.count:,} of {self.read:,} rows ({share:.1%}) {text} (first: {found.first[0]}{why})"]

    def dropped(self) -> int:
        """Return how many rows are not trained or validated on."""
        return self.bad.count + self.overlong.count + self.without_label.count + self.unlearned.count

    def first_dropped(self) -> str:
        """Return where a row is that is not trained or validated on."""
        counts = (self.without_label, self.overlong, self.unlearned, self.bad)
        return next(found.first[0] for found in counts if found.first)

    def check(self, max_truncated: float | None, max_dropped: float | None, max_duplicates: float | None) -> None:
        """Raise DataError where more rows than allowed, as shares of all that were read, were lost or are doubles."""
        gates: Sequence[tuple[str, float | None, int, str]] = (
            ("max_truncated", max_truncated, self.truncated.count, "are truncated"),
            ("max_dropped", max_dropped, self.dropped(), "are dropped"),
            ("max_duplicates", max_duplicates, self.duplicates.count, "are exact doubles"),
        )
        for flag, limit, count, what in gates:
            if limit is not None and count > limit * self.read:
                raise DataError(
                    f"--{flag} {limit}: {count:,} of {self.read:,} rows ({count / self.read:.1%}) {what}; "
                    + "; ".join(line for line in self.lines() if line.startswith("warning"))
                )

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Statistics":
        """Return statistics that were saved. Counts that only earlier versions made are left out."""
        counts = {found.name for found in fields(cls) if found.default_factory is Count}
        values: dict[str, Any] = {
            key: Count(**value) if key in counts else value for key, value in stored.items() if key not in FORMER
        }
        return cls(**values)
