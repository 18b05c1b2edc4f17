"""The rows that models are compared on are those that the run held out, of data that is as it was."""

import json

import pytest
import short_run

from lora_alpaca.artifacts.source import open_adapter
from lora_alpaca.data import Rows, held_out
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.export.proof.samples import MOST_ROWS, from_validation, padded


@pytest.fixture
def run(tiny_llama, rows, tmp_path):
    """Return an adapter's folder, and the file of its rows."""
    folder = short_run.adapter(tmp_path, tiny_llama, rows, max_steps=1, val_set_size=5, seed=7)
    return folder, tmp_path / "rows.json"


def samples(folder, most=10_000):
    source = open_adapter(folder)
    tokenizer, template, _ = source.load_tokenizer()
    return (*from_validation(folder, tokenizer, template, source.base.vocabulary, most), tokenizer, template)


def test_they_are_the_rows_that_were_held_out_the_shortest_first(run):
    folder, path = run
    found, why, tokenizer, template = samples(folder)
    rows = list(Rows(str(path)))
    numbers = held_out(len(rows), 5, 7)
    examples = Encoder.for_prompts(tokenizer, template).encode([rows[number] for number in sorted(numbers)])
    assert 5 == len(found) <= MOST_ROWS and why == ""
    assert sorted(sample.ids for sample in found) == sorted(example.ids.tolist() for example in examples)
    assert [len(sample.ids) for sample in found] == sorted(len(sample.ids) for sample in found)
    learned = {tuple(example.ids.tolist()): example.mask().nonzero()[0].tolist() for example in examples}
    assert all(sample.answer == learned[tuple(sample.ids)] and sample.is_row for sample in found)
    two = len(found[0].ids) + len(found[1].ids)
    assert [sample.ids for sample in samples(folder, two)[0]] == [sample.ids for sample in found[:2]]
    assert padded(found).shape == (5, max(len(sample.ids) for sample in found))


def test_data_that_has_changed_or_is_gone_is_not_compared_on(run):
    folder, path = run
    *_, tokenizer, template = samples(folder)
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(rows[::-1]))
    assert samples(folder)[:2] == ([], "the data of the run has changed")
    path.write_text("[")
    assert samples(folder)[1].startswith("the data of the run cannot be read as then")
    path.unlink()
    assert samples(folder)[:2] == ([], "the data of the run is not here")
    (folder / "lora_alpaca.private.json").unlink()
    assert from_validation(folder, tokenizer, template, 1000, 100)[0] == []
