"""What the answers in the rows cost a model: the loss of training, row by row, by a plain forward."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from lora_alpaca.data.examples import Example, label_positions

MOST_LOGITS = 2**26  # of a batch


class Loss(NamedTuple):
    """The summed loss of a row in nats, and the number of tokens that it is of."""

    nats: float
    tokens: int


@torch.inference_mode()
def row_losses(model: Any, rows: Sequence[Sequence[Example]], advance: Callable[[int], None]) -> list[Loss]:
    """Return the loss of every row, which is the sum over its examples; `advance` is told the tokens of each row."""
    flat = [(number, example) for number, examples in enumerate(rows) for example in examples]
    nats, tokens = [0.0] * len(rows), [0] * len(rows)
    by_length = sorted(flat, key=lambda entry: len(entry[1].ids))
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    for batch in _batches(by_length, MOST_LOGITS // vocabulary):
        examples = [example for _, example in batch]
        found, labels = _losses(model, examples)
        for row, loss in zip(labels, found, strict=True):
            nats[batch[row][0]] += loss
            tokens[batch[row][0]] += 1
        for example in examples:
            advance(len(example.ids))
    return [Loss(*pair) for pair in zip(nats, tokens, strict=True)]


def _batches(by_length: Sequence[tuple[int, Example]], most: int) -> Iterator[Sequence[tuple[int, Example]]]:
    """Yield examples of like lengths, so many that padded to the longest they have at most so many tokens; or one."""
    first = 0
    for last in range(1, len(by_length) + 1):
        if last == len(by_length) or (last + 1 - first) * len(by_length[last][1].ids) > most:
            yield by_length[first:last]
            first = last


def _losses(model: Any, examples: Sequence[Example]) -> tuple[list[float], list[int]]:
    """Return the loss of every label of some examples, and the example that each belongs to."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.from_numpy(example.ids.astype("int64"))
        mask[row, : len(example.ids)] = 1
    found = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    rows, positions = map(torch.from_numpy, label_positions(examples))
    logits = found[rows.to(found.device), (positions - 1).to(found.device)].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[rows, positions].to(found.device), reduction="none")
    return losses.double().cpu().tolist(), rows.tolist()
