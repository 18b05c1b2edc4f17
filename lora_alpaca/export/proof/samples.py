"""The tokens that models are compared on: prompts of our own with their answers, and rows of the run's validation."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import privacy
from lora_alpaca.config.shared import DEMO
from lora_alpaca.data import Rows, held_out
from lora_alpaca.data.encoding import Choices, Encoder
from lora_alpaca.errors import LoraAlpacaError
from lora_alpaca.prompts import AnyTemplate, Conversation
from lora_alpaca.storage.output_folder import read_record
from lora_alpaca.storage.paths import user_path

MOST_TOKENS = 512  # that models are compared on
MOST_ROWS = 200  # that the shortest are chosen of
LARGEST_FILE = 200 * 10**6  # bytes of a data file that is read again for a few rows


@dataclass(frozen=True)
class Sample:
    """A sequence of ids. `answer` has the places of ids that a model is asked to predict; a row is one of the user's.

    Of a prompt of ours these are what base + adapter answers, of a row the learned tokens.
    """

    ids: list[int]
    answer: list[int]
    is_row: bool = False


def from_probes(receipt: dict[str, Any], most: int) -> list[Sample]:
    """Return the probes of a served receipt with the answers of base + adapter, of at most so many tokens in all."""
    found = []
    for probe in receipt["probes"]:
        prompt, new = probe["prompt_ids"], [place[0][0] for place in probe["tuned"]["places"]]
        if probe["tuned"]["ends"] is not None:
            new = new[: probe["tuned"]["ends"] + 1]
        found.append(Sample(prompt + new, list(range(len(prompt), len(prompt) + len(new)))))
    return _fitting(found, most)


def from_prompts(tokenizer: Any, template: AnyTemplate, prompts: Sequence[Conversation], most: int) -> list[Sample]:
    """Return prompts without answers, of at most so many tokens in all."""
    encoder = Encoder.for_prompts(tokenizer, template)
    found = []
    for prompt in prompts:
        try:
            found.append(Sample(encoder.prompt(prompt), []))
        except LoraAlpacaError:  # one that the template cannot hold
            continue
    return _fitting(found, most)


def from_validation(
    adapter: Path, tokenizer: Any, template: AnyTemplate, vocabulary: int, most: int
) -> tuple[list[Sample], str]:
    """Return the shortest of a run's first validation rows, of at most so many tokens in all; or why there are none.

    They are read again from the run's own data, where its private file says that this lies, if that is unchanged.
    """
    record = privacy.whole(adapter, read_record(adapter))
    options = record.get("options") or {}
    path = options.get("val_data_path") or options.get("data_path")
    if not path or record.get("kind") != "adapter":
        return [], "the run does not record its data"
    if path != DEMO and not user_path(path).is_file():
        return [], "the data of the run is not here"
    if path != DEMO and user_path(path).stat().st_size > LARGEST_FILE:
        return [], "the data of the run is large"
    try:
        rows = Rows(path, options.get("columns"), options.get("skip_bad_rows", False), options.get("ignore_fields"))
        own = bool(options.get("val_data_path"))
        if rows.digest != record.get("val_data_sha256" if own else "data_sha256"):
            return [], "the data of the run has changed"
        numbers = set(range(len(rows))) if own else held_out(len(rows), options.get("val_set_size"), options["seed"])
        encoder = Encoder(tokenizer, template, _choices(options), vocabulary)
        held = (row for number, row in enumerate(rows) if number in numbers)
        examples = encoder.encode(list(islice(held, MOST_ROWS)))
    except (LoraAlpacaError, KeyError, TypeError) as error:
        return [], f"the data of the run cannot be read as then ({str(error)[:100]})"
    found = [
        Sample(example.ids.tolist(), [place for place in example.mask().nonzero()[0].tolist() if place], is_row=True)
        for example in examples
    ]
    chosen = _fitting(sorted(found, key=lambda sample: len(sample.ids)), most)
    return chosen, "" if chosen else "the run validated on no row that is short enough"


def padded(samples: Sequence[Sample]) -> torch.Tensor:
    """Return the ids of samples, int64 [samples, longest], padded on the right, which no earlier token sees."""
    longest = max(len(sample.ids) for sample in samples)
    return torch.tensor([sample.ids + [0] * (longest - len(sample.ids)) for sample in samples])


def _choices(options: dict[str, Any]) -> Choices:
    known = {name: options[name] for name in Choices.__dataclass_fields__ if name in options}
    return Choices(**known)


def _fitting(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return the first samples that have at most so many tokens together."""
    found, tokens = [], 0
    for sample in samples:
        if sample.ids and tokens + len(sample.ids) <= most:
            found.append(sample)
            tokens += len(sample.ids)
    return found
