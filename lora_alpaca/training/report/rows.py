"""The rows that a report measures: which training rows, what each row cost, and what it says."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lora_alpaca.data.examples import Examples
from lora_alpaca.data.questions import Question, prompt_text
from lora_alpaca.data.row_losses import RowLoss
from lora_alpaca.prompts import Conversation
from lora_alpaca.training.reading import RunRows

SHARE = 0.01  # of the rows that a run trains on; two passes over them cost about as much of its time
MOST = 2000  # rows, however long the run is
SHOWN = 10  # rows of a list
LONGEST = 600  # characters of a text that is shown
Key = tuple[str, int]  # training or validation, and the row's number over all files, from 0


def chosen(train: Examples, trained_rows: int, asked: int | None, seed: int) -> list[int]:
    """Return which training examples are measured: so many as are asked for, or else a share of those of the run."""
    most = min(MOST, -int(-trained_rows * SHARE // 1)) if asked is None else asked
    return sorted(random.Random(seed).sample(range(len(train)), min(most, len(train))))


class RowTable:
    """The losses of rows before and after. `after_step` is the step of those of the validation rows."""

    def __init__(self, rows: RunRows):
        self._rows = rows
        self._losses: dict[Key, dict[str, float]] = defaultdict(dict)
        self._tokens: dict[Key, int] = {}
        self._texts: dict[Key, tuple[str, str, str]] = {}  # where, prompt, expected answer
        self.after_step = 0

    def note(self, when: str, part: str, examples: Examples, places: Sequence[int], nats: Sequence[float]) -> None:
        """Note the summed losses of examples, each to the row that it was made of."""
        sums: dict[Key, float] = defaultdict(float)
        tokens: dict[Key, int] = defaultdict(int)
        for place, loss in zip(places, nats, strict=True):
            key = part, int(examples.numbers[place])
            sums[key] += loss
            tokens[key] += examples[place].num_labels()
        for key, loss in sums.items():
            self._losses[key][when] = loss / tokens[key]
            self._tokens[key] = tokens[key]

    def recall(self, lines: Sequence[RowLoss], step: int) -> None:
        """Take what an earlier process of this run has measured; of the validation rows, if that step is still so."""
        self.after_step = step
        for line in lines:
            key = line.part, line.number - 1 + self._first(line.part)
            self._tokens[key] = line.tokens
            if line.before is not None:
                self._losses[key]["before"] = line.before
            if line.after is not None and line.part == "validation":
                self._losses[key]["after"] = line.after

    def read_texts(self) -> None:
        """Read what the measured rows say, in one pass over the data. Raises DataError where it changed meanwhile."""
        wanted = {number: (part, number) for part, number in self._losses if (part, number) not in self._texts}
        first = 0
        for rows in self._rows.parts if wanted else ():
            for number, row in enumerate(rows, start=first):
                if number in wanted:
                    question = asked(row, number - first + 1)
                    prompt, expected = prompt_text(question.conversation), question.expected or ""
                    if question.conversation is None:
                        prompt, expected = "", " ".join(row.texts())
                    self._texts[wanted[number]] = row.where, _short(prompt), _short(expected)
            first += len(rows)

    def lines(self) -> list[RowLoss]:
        """Return the table, in the order of the rows."""
        return [
            RowLoss(
                part,
                number - self._first(part) + 1,
                self._texts.get((part, number), ("", "", ""))[0],
                self._tokens[part, number],
                losses.get("before"),
                losses.get("after"),
            )
            for (part, number), losses in sorted(self._losses.items(), key=lambda item: item[0][1])
            if losses
        ]

    def extremes(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows with the highest loss after training, or so far, and those with the lowest before it."""
        whole = [(key, losses) for key, losses in self._losses.items() if losses]
        highest = sorted(whole, key=lambda item: -item[1].get("after", item[1].get("before", 0.0)))
        lowest = sorted((item for item in whole if "before" in item[1]), key=lambda item: item[1]["before"])
        return {"highest": self._shown(highest), "lowest": self._shown(lowest)}

    def _shown(self, found: Sequence[tuple[Key, Mapping[str, float]]]) -> list[dict[str, Any]]:
        lines = []
        for key, losses in found[:SHOWN]:
            where, prompt, expected = self._texts.get(key, ("", "", ""))
            facts = {"part": key[0], "number": key[1] - self._first(key[0]) + 1, "tokens": self._tokens[key]}
            lines.append({**facts, "where": where, "prompt": prompt, "expected": expected, **losses})
        return lines

    def _first(self, part: str) -> int:
        """Return the number of the first row of the data that a part's rows are numbered in."""
        return len(self._rows.train) if part == "validation" and self._rows.validation is not None else 0


def asked(row: Conversation, number: int) -> Question:
    """Return a row as the question that its last answer is of; a document has none."""
    if row.is_document or not row.prompt.messages or row.prompt.messages[-1].is_blank:
        return Question(number, row.where, None, None, "the row asks nothing")
    return Question(number, row.where, row.prompt, row.messages[-1])


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
