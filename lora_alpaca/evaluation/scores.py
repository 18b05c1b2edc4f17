"""Scores of answers, each with its standard error: how far off it may be for the chance of which rows there are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_alpaca.data.text_scores import SIZE, repetition, words
from lora_alpaca.evaluation.losses import Loss


@dataclass(frozen=True)
class Answered:
    """What a model made of a row. `error` says why there is no answer; the scores are None where they have no sense."""

    answer: str
    loss: Loss
    exact_match: float | None = None
    rouge_l: float | None = None
    stopped: float | None = None
    tokens: int | None = None
    repetition: float | None = None
    error: str = ""


SCORES: dict[str, tuple[str, str]] = {  # name: how it is called, and what it is
    "loss": ("loss", "nats per token of the expected answers, end token included; less is better"),
    "exact_match": ("exact match", "share of answers that are the expected text, but for white space around it"),
    "rouge_l": ("ROUGE-L", "longest common subsequence of words with the expected answer, F measure"),
    "stopped": ("stop rate", "share of answers that ended by themselves, before --max_new_tokens"),
    "tokens": ("length", "tokens of an answer, the one that ends it included"),
    "repetition": ("repetition", f"share of {SIZE} words in a row that stood in the same answer before"),
}


def scored(answer: str, expected: str | None, loss: Loss, stopped: bool, tokens: int, rouge: Any) -> Answered:
    """Return the scores of an answer; `rouge` is what `rouge_l` takes."""
    return Answered(
        answer,
        loss,
        exact_match=None if expected is None else float(answer.strip() == expected.strip()),
        rouge_l=None if expected is None else rouge(expected, answer),
        stopped=float(stopped),
        tokens=tokens,
        repetition=repetition(answer),
    )


def rouge_l() -> Callable[[str, str], float]:
    """Return a function of the expected and the given text that returns their ROUGE-L as a share."""
    from rouge_score.rouge_scorer import RougeScorer

    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    scorer = RougeScorer(["rougeL"], tokenizer=Tokenizer())
    return lambda expected, answer: float(scorer.score(expected, answer)["rougeL"].fmeasure)


# ------------------------------------------------------------------------------------------------------ over all rows


Figures = dict[str, dict[str, float | int | None]]


def summary(rows: Sequence[Answered]) -> Figures:
    """Return score -> its mean, standard error, and the number of rows that have it."""
    found: Figures = {}
    for name in SCORES:
        values = _values(rows, name)
        if values:
            mean, error = ratio(values)
            found[name] = {"mean": mean, "standard_error": error, "rows": len(values)}
    return found


def differences(rows: Sequence[Answered], base: Sequence[Answered]) -> Figures:
    """Return score -> how much higher it is than the base's, row by row, and the standard error of that."""
    found: Figures = {}
    for name in SCORES:
        both = [(_value(one, name), _value(other, name)) for one, other in zip(rows, base, strict=True)]
        pairs = [(one, other) for one, other in both if one is not None and other is not None]
        if pairs:
            mean, error = ratio([(one[0] - other[0], one[1]) for one, other in pairs])
            found[name] = {"mean": mean, "standard_error": error}
    return found


def ratio(values: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """Return the sum of the values over the sum of their weights, and its standard error, rows being independent.

    One row has none.
    """
    total = sum(weight for _, weight in values)
    mean = sum(value for value, _ in values) / total
    number = len(values)
    if number < 2:
        return mean, None
    spread = sum((value - mean * weight) ** 2 for value, weight in values)
    return mean, math.sqrt(spread * number / (number - 1)) / total


def _values(rows: Sequence[Answered], name: str) -> list[tuple[float, float]]:
    return [value for row in rows if (value := _value(row, name)) is not None]


def _value(row: Answered, name: str) -> tuple[float, float] | None:
    """Return the score of a row and its weight: the tokens of its answer for the loss, and 1 for the others."""
    if name == "loss":
        return (row.loss.nats, float(row.loss.tokens)) if row.loss.tokens else None
    value = getattr(row, name)
    return None if value is None else (float(value), 1.0)


def shown(figures: Mapping[str, Any] | None, name: str, sign: bool = False) -> str:
    """Return a mean and its standard error as people read them, empty if there is none."""
    mean, error = with_error(figures, name, sign)
    return f"{mean} ± {error}" if error else mean


def with_error(figures: Mapping[str, Any] | None, name: str, sign: bool = False) -> tuple[str, str]:
    """Return a mean and its standard error as people read them: shares in percent, changes, with a sign, in points."""
    if figures is None:
        return "", ""
    scale, digits = {"loss": (1, 4), "tokens": (1, 1)}.get(name, (100, 1))
    unit = "" if scale == 1 else " points" if sign else " %"
    mean, error = figures["mean"] * scale, figures["standard_error"]
    shown = "" if not error else f"{error * scale:.{digits}f}"  # all rows alike: it says nothing
    return f"{mean:{'+' if sign else ''}.{digits}f}{unit}", shown
