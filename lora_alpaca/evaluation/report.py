"""The page of an evaluation: scores, and the answers side by side. It has its data in it and loads nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_alpaca.data import web_page
from lora_alpaca.data.questions import Question, prompt_text
from lora_alpaca.errors import visible
from lora_alpaca.evaluation.scores import SCORES, Answered, with_error

FILE = "index.html"
LESS_IS_BETTER = {"loss": True, "exact_match": False, "rouge_l": False, "stopped": False, "repetition": True}
SURE = 2.0  # standard errors beyond which a change is coloured


def page(result: Mapping[str, Any], questions: Sequence[Question], answered: Mapping[str, Sequence[Answered]]) -> str:
    """Return the page. Texts of rows and answers are data in it, which only ever become text."""
    names = list(answered)
    rows = [
        {
            "row": question.number,
            "where": visible(question.where),
            "prompt": visible(prompt_text(question.conversation)),
            "expected": None if question.expected is None else visible(question.expected),
            "models": [_model(answered[name][place]) for name in names],
        }
        for place, question in enumerate(questions)
    ]
    adapters = f", adapter {', '.join(result['adapters'])}" if result["adapters"] else ""
    data = {
        "names": names,
        "what": visible(f"base {result['base_model']}{adapters}; {result['rows_from']}"),
        "scores": [
            _score(result, name) for name in SCORES if any(name in found for found in result["models"].values())
        ],
        "rows": rows,
    }
    blank = (Path(__file__).parent / "page.html").read_text(encoding="utf-8").replace("__STYLE__", web_page.STYLE)
    return blank.replace("__DATA__", web_page.as_data(data))


def _model(row: Answered) -> dict[str, Any]:
    loss = round(row.loss.nats / row.loss.tokens, 4) if row.loss.tokens else None
    return {
        "answer": visible(row.answer),
        "error": visible(row.error),
        "loss": loss,
        "exact": bool(row.exact_match),
        "rouge": None if row.rouge_l is None else round(row.rouge_l, 4),
        "stopped": row.stopped,
        "tokens": row.tokens,
        "repetition": None if row.repetition is None else round(row.repetition, 4),
    }


def _score(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a line of the table of scores."""
    called, meaning = SCORES[name]
    cells = [_cell(found.get(name), name) for found in result["models"].values()]
    for found in result["differences"].values():
        cells.append(_cell(found.get(name), name, sign=True) | {"verdict": _verdict(found.get(name), name)})
    return {"called": called, "meaning": meaning, "cells": cells}


def _cell(figures: Mapping[str, Any] | None, name: str, sign: bool = False) -> dict[str, Any]:
    mean, error = with_error(figures, name, sign)
    return {"mean": mean or None, "error": error or None}


def _verdict(figures: Mapping[str, Any] | None, name: str) -> str:
    """Return whether a change is for better or worse, beyond what chance may do; empty where neither is known."""
    if figures is None or not figures["standard_error"] or name not in LESS_IS_BETTER:
        return ""
    if abs(figures["mean"]) <= SURE * figures["standard_error"]:
        return ""
    return "good" if (figures["mean"] < 0) == LESS_IS_BETTER[name] else "bad"
