"""The answers of all models side by side as a parquet table, a line for every row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lora_alpaca.data.questions import Question, prompt_text
from lora_alpaca.evaluation.scores import Answered

FILE = "answers.parquet"
SCORES = ("exact_match", "rouge_l", "stopped", "tokens", "repetition")


def write(path: Path, questions: Sequence[Question], answered: Mapping[str, Sequence[Answered]]) -> None:
    """Write the table: `row`, `where`, `prompt`, `expected`, and of every model NAME its NAME_answer and NAME_SCORE.

    `NAME_loss` is in nats per token of the expected answer, `NAME_error` why a row has no answer.
    """
    columns: dict[str, list[Any]] = {
        "row": [question.number for question in questions],
        "where": [question.where for question in questions],
        "prompt": [prompt_text(question.conversation) for question in questions],
        "expected": [question.expected for question in questions],
    }
    for name, rows in answered.items():
        columns[f"{name}_answer"] = [None if row.error else row.answer for row in rows]
        columns[f"{name}_loss"] = [row.loss.nats / row.loss.tokens if row.loss.tokens else None for row in rows]
        for score in SCORES:
            columns[f"{name}_{score}"] = [getattr(row, score) for row in rows]
        columns[f"{name}_error"] = [row.error or None for row in rows]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
