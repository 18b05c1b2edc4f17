"""Answers to a few held-out rows, before and after, by the model in place: greedy, and bounded in time.

What they are bounded by: `LONGEST` tokens each, less where no expected answer is half as long; and a share of the run's
time, so that a short run is not spent on its report. Whoever asks for a number of answers gets them all.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from lora_alpaca.artifacts import prompt_contract
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.questions import prompt_text
from lora_alpaca.data.text_scores import repetition
from lora_alpaca.prompts import Conversation
from lora_alpaca.training.job import Job
from lora_alpaca.training.reading import RunRows
from lora_alpaca.training.report.rows import asked
from lora_alpaca.training.step import Stepper

ROWS = 8  # unless another number is asked for
SHARE = 0.005  # of the run's time, before and after each
LEAST = 0.2  # seconds; with less than this, none is answered
LONGEST = 256  # tokens of an answer
LONGEST_PROMPT = 1024  # tokens; rows with longer prompts are passed over
SHORT = 60  # characters up to which an expected answer is compared letter by letter


@dataclass(frozen=True)
class Asked:
    """A held-out row that is answered."""

    number: int  # from 1, in its data
    where: str
    prompt: str
    expected: str
    expected_tokens: int
    ids: list[int]  # of the prompt


def choose(job: Job, rows: RunRows, number: int) -> list[Asked]:
    """Return validation rows to answer, spread evenly over all of them. Raises DataError for data that changed."""
    numbers = sorted({int(row) for row in job.validation.numbers})
    wanted = set(numbers[:: max(1, len(numbers) // max(1, number))])
    encoder = Encoder.for_prompts(job.tokenizer, job.template, job.base.vocabulary)
    source, first = (rows.train, 0) if rows.validation is None else (rows.validation, len(rows.train))
    found = (
        _asked(row, place - first + 1, encoder, job.tokenizer)
        for place, row in enumerate(source, first)
        if place in wanted
    )
    return list(islice((one for one in found if one is not None), number))


def _asked(row: Conversation, number: int, encoder: Encoder, tokenizer: Any) -> Asked | None:
    question = asked(row, number)
    if question.conversation is None or question.expected is None:
        return None
    ids = encoder.prompt(question.conversation)
    if len(ids) > LONGEST_PROMPT:
        return None
    tokens = len(tokenizer(question.expected, add_special_tokens=False).input_ids)
    return Asked(number, row.where, prompt_text(question.conversation), question.expected, tokens, ids)


def longest(asked: Sequence[Asked]) -> int:
    """Return the most tokens of an answer: twice the longest expected one, within limits."""
    return min(LONGEST, max(32, 2 * max(one.expected_tokens for one in asked)))


@torch.no_grad()
def answer(stepper: Stepper, job: Job, asked: Sequence[Asked], seconds: float) -> list[dict[str, Any]]:
    """Return an answer to each row, as its text, tokens, and whether it ended by itself, at its limit or by the time.

    Where ranks compute in lockstep, every rank calls it, with the same rows.
    """
    model, device, tokenizer = stepper.model, stepper.world.device, job.tokenizer
    stop_ids = prompt_contract.stop_ids(model.generation_config.eos_token_id, tokenizer, job.template)
    width = max(len(one.ids) for one in asked)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(one.ids)) + one.ids for one in asked], device=device)
    mask = torch.tensor([[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in asked], device=device)
    access, begun = stepper.engine.access, time.perf_counter()

    def is_late(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        late = access.largest(time.perf_counter() - begun) > seconds  # one clock for all ranks
        return torch.full((len(input_ids),), late, device=input_ids.device)

    def generate(_: Any) -> torch.Tensor:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest(asked),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=None,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=stop_ids or None,
            stopping_criteria=[is_late],
        )

    model.eval()
    with stepper.world.autocast(), _dense_input(model.get_output_embeddings()):
        output = access.call(generate, None)[:, width:].tolist()
    return [_answer(row, set(stop_ids), longest(asked), tokenizer) for row in output]


@contextmanager
def _dense_input(head: torch.nn.Module) -> Iterator[None]:
    """Within this context, a head is given dense tensors.

    Of a prompt, it is given the last place of every row, which is a view with gaps: torch then multiplies a copy of the
    head's weight for every row, gigabytes of it.
    """
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def _answer(ids: list[int], stop_ids: set[int], most: int, tokenizer: Any) -> dict[str, Any]:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    ended = "stop" if end is not None else "length" if len(ids) >= most else "time"
    return {"text": text, "tokens": len(ids) if end is None else end + 1, "ended": ended}


def facts(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Return the rows as a report keeps them."""
    return [{key: value for key, value in asdict(one).items() if key != "ids"} for one in asked]


def scores(rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return means over answers: of those that had the time to end, but for repetition, None where there are none."""
    pairs = [(row, one) for row, one in zip(rows, answers, strict=True) if one["ended"] != "time"]
    exact = [row["expected"].strip() == one["text"] for row, one in pairs if len(row["expected"]) <= SHORT]
    return {
        "stopped": _mean([one["ended"] == "stop" for _, one in pairs]),
        "tokens": _mean([one["tokens"] for _, one in pairs]),
        "expected_tokens": _mean([row["expected_tokens"] + 1 for row, _ in pairs]),
        "repetition": _mean([repetition(one["text"]) for one in answers]),
        "exact": _mean(exact),
        "short": len(exact),
        "ended": len(pairs),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
