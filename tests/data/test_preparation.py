import json
import os

import pytest

from lora_alpaca.config.shared import DataOptions
from lora_alpaca.data import Rows, preparation
from lora_alpaca.data.cache import KEPT, cache_key, cached, keep
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import IGNORED, Builder, Examples
from lora_alpaca.data.preparation import prepare
from lora_alpaca.data.statistics import Statistics
from lora_alpaca.data.tokenization import hash_tokenizer
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import load_template

ROW = {"instruction": "Greet.", "input": "", "output": "Hello."}
LONG = {"instruction": "Greet.", "input": "", "output": "Hello. " * 200}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def prepared(tokenizer, tmp_path):
    """Return `prepared(rows, held_out=(), template="alpaca_short", **options)`."""

    def make(rows, held_out=(), template="alpaca_short", **options):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
        options = DataOptions(**{"cutoff_len": 100} | options)
        encoder = Encoder(tokenizer, load_template(template).bound(tokenizer), options.cutoff_len)
        rows = Rows(str(path), skip_bad_rows=options.skip_bad_rows)
        return prepare(rows, encoder, options, set(held_out), lambda done: None)

    return make


def numbered(count):
    return [ROW | {"output": f"Hello {number}."} for number in range(count)]


# --------------------------------------------------------------------------------------------------------- examples


def test_examples_are_what_was_added():
    builder = Builder()
    builder.add([5, 6, 7, 8], [(1, 2), (3, 4)])
    builder.add([9], [])
    examples = builder.build()
    assert [(row.input_ids, row.labels) for row in examples] == [
        ([5, 6, 7, 8], [IGNORED, 6, IGNORED, 8]),
        ([9], [IGNORED]),
    ]
    assert examples.lengths == (4, 1)
    assert examples[-1].input_ids == [9]
    assert [row.input_ids for row in examples[0:2]] == [[5, 6, 7, 8], [9]]
    with pytest.raises(IndexError):
        examples[2]


def test_examples_are_mapped_as_they_were_saved(tmp_path):
    builder = Builder()
    for number in range(50):
        builder.add(list(range(number + 1)), [(number // 2, number + 1)])
    examples = builder.build()
    examples.save(tmp_path, "train")
    assert list(Examples.mapped(tmp_path, "train")) == list(examples)
    Builder().build().save(tmp_path, "validation")
    assert list(Examples.mapped(tmp_path, "validation")) == []


def test_a_file_that_was_cut_short_is_not_whole(tmp_path):
    builder = Builder()
    builder.add([1, 2, 3], [(0, 3)])
    builder.build().save(tmp_path, "train")
    assert Examples.mapped(tmp_path, "train").is_whole()
    (tmp_path / "train.ids").write_bytes((tmp_path / "train.ids").read_bytes()[:-4])
    assert not Examples.mapped(tmp_path, "train").is_whole()


def test_documents_are_put_end_to_end_and_cut_to_blocks():
    builder = Builder(block=4)
    for ids in ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]):
        builder.add(ids, [])
    blocks = [row.input_ids for row in builder.build()]
    assert blocks == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert all(row.labels == row.input_ids for row in builder.build())


# ------------------------------------------------------------------------------------------- what becomes of the rows


def test_a_long_answer_is_cut_and_counted(prepared, tokenizer):
    found = prepared([LONG, ROW])
    assert len(found.train[0].input_ids) == 100
    assert found.train[0].labels[-1] not in (IGNORED, tokenizer.eos_token_id)
    assert found.train[1].labels[-1] == tokenizer.eos_token_id
    ledger = found.statistics
    assert (ledger.truncated.count, ledger.truncated.first, ledger.ends_lost.count) == (1, ["rows.json:1"], 1)
    assert any("1 of 2 rows (50.0%) are longer than --cutoff_len 100" in line for line in ledger.lines())


def test_long_rows_may_be_dropped(prepared):
    found = prepared([LONG, ROW], overlong="drop")
    assert (len(found.train), found.statistics.overlong.first, found.statistics.truncated.count) == (
        1,
        ["rows.json:1"],
        0,
    )


def test_long_rows_may_be_an_error(prepared):
    with pytest.raises(DataError, match=r"rows\.json:2: \d+ tokens, more than --cutoff_len 100"):
        prepared([ROW, LONG], overlong="error")


def test_a_prompt_that_fills_the_row_is_dropped(prepared):
    found = prepared([ROW | {"instruction": "word " * 300}, ROW])
    assert (len(found.train), found.statistics.without_label.first) == (1, ["rows.json:1"])
    with pytest.raises(DataError, match=r"no row has anything to learn at --cutoff_len 100.*first: rows\.json:1"):
        prepared([ROW | {"instruction": "word " * 300}])


def test_a_cut_behind_an_answer_keeps_its_end(prepared, tokenizer):
    """What is left of a prompt whose answer is gone is not kept."""
    turns = [("human", "Hi."), ("gpt", "Hello."), ("human", "word " * 300), ("gpt", "Yes.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    found = prepared([row], template="vicuna", cutoff_len=200)
    assert found.train[0].labels[-1] == tokenizer.eos_token_id
    assert len(found.train[0].input_ids) < 200
    assert (found.statistics.truncated.count, found.statistics.ends_lost.count) == (1, 1)


def test_held_out_rows_are_validation(prepared):
    found = prepared(numbered(5), held_out=[1, 3])
    everything = prepared(numbered(5))
    assert list(found.validation) == [everything.train[1], everything.train[3]]
    assert list(found.train) == [everything.train[n] for n in (0, 2, 4)]


def test_many_chunks_are_one(prepared, monkeypatch):
    whole = prepared(numbered(25), held_out=[7, 20])
    monkeypatch.setattr(preparation, "CHUNK", 4)
    chunked = prepared(numbered(25), held_out=[7, 20])
    assert list(whole.train) == list(chunked.train)
    assert list(whole.validation) == list(chunked.validation)
    assert whole.statistics == chunked.statistics


def test_documents_become_blocks(prepared, tokenizer):
    found = prepared([{"text": "The owl hoots. " * 30}, {"text": "Short."}], template="plain")
    assert [len(row.input_ids) for row in found.train][:-1] == [100] * (len(found.train) - 1)
    ids = [token for row in found.train for token in row.input_ids]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert ids.count(tokenizer.bos_token_id) == 2
    assert all(row.labels == row.input_ids for row in found.train)


def test_the_ledger_counts(prepared, tokenizer):
    rows = [
        *numbered(6),
        numbered(1)[0],
        ROW | {"output": ""},
        ROW | {"instruction": " "},
        ROW | {"output": "</s>"},
        {},
    ]
    found = prepared(rows, held_out=[0, 3], skip_bad_rows=True)
    ledger = found.statistics
    assert (ledger.read, ledger.train, ledger.validation) == (11, 8, 2)
    assert ledger.formats == {"Alpaca": 10}
    assert ledger.shared.count == 1  # the other held out row is nowhere else
    assert (ledger.bad.first, ledger.duplicates.first, ledger.shared.first) == (
        ["rows.json:11"], ["rows.json:7"], ["rows.json:1"],
    )  # fmt: skip
    assert ledger.empty_answers.first == ["rows.json:8"]
    assert ledger.blank_instructions.first == ["rows.json:9"]
    assert (ledger.control_text.first, ledger.control_text.example) == (["rows.json:10"], "</s>")
    assert ledger.tokens == sum(len(row.input_ids) for row in found.train)
    assert ledger.learned == sum(label != IGNORED for row in found.train for label in row.labels)
    assert ledger.percentiles["longest"] == max(map(len, (row.input_ids for row in found.train)))
    assert Statistics.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    said = "\n".join(ledger.lines())
    for words in ("cannot be used", "exact doubles", "both the training and", "empty answer", "blank instruction"):
        assert words in said
    assert all("\n" not in line for line in ledger.lines())


@pytest.mark.parametrize(
    ("given", "limits", "flag"),
    [
        ([LONG, ROW], (0.4, None, None), "max_truncated 0.4: 1 of 2 rows (50.0%) are truncated"),
        ([ROW, ROW, {}], (None, 0.3, None), "max_dropped 0.3: 1 of 3 rows (33.3%) are dropped"),
        ([ROW, ROW], (None, None, 0.0), "max_duplicates 0.0: 1 of 2 rows (50.0%) are exact doubles"),
    ],
)
def test_a_gate_turns_a_share_into_an_error(prepared, given, limits, flag):
    ledger = prepared(given, skip_bad_rows=True).statistics
    with pytest.raises(DataError) as error:
        ledger.check(*limits)
    assert flag in str(error.value)
    assert "\n" not in str(error.value)
    ledger.check(*(None if limit is None else 0.5 for limit in limits))
    ledger.check(None, None, None)


# ------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def job(tokenizer, tmp_path):
    """Return rows, encoder, options and key of a data set, ready for the cache."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(numbered(10)))
    options = DataOptions()
    encoder = Encoder(tokenizer, load_template("alpaca"))
    rows = Rows(str(path))
    return rows, encoder, options, cache_key(rows, encoder, options, {3}, hash_tokenizer(tokenizer))


def test_the_cache_gives_back_what_it_was_given(job, tmp_path):
    rows, encoder, options, key = job
    fresh = prepare(rows, encoder, options, {3}, lambda done: None)
    assert cached(tmp_path / "cache", key) is None
    kept = keep(tmp_path / "cache", key, fresh)
    again = cached(tmp_path / "cache", key)
    for found in (kept, again):
        assert list(found.train) == list(fresh.train)
        assert list(found.validation) == list(fresh.validation)
        assert found.statistics == fresh.statistics
    assert not list((tmp_path / "cache").glob(".partial*"))


@pytest.mark.parametrize("damage", ["ids", "starts", "ledger.json"])
def test_a_damaged_cache_is_none_and_is_made_anew(job, tmp_path, damage):
    rows, encoder, options, key = job
    fresh = prepare(rows, encoder, options, {3}, lambda done: None)
    keep(tmp_path / "cache", key, fresh)
    file = next((tmp_path / "cache" / key).glob(f"*{damage}"))
    file.write_bytes(file.read_bytes()[:-8])
    assert cached(tmp_path / "cache", key) is None
    assert list(keep(tmp_path / "cache", key, fresh).train) == list(fresh.train)


def test_the_key_is_of_everything_that_matters(job, tokenizer, tmp_path):
    rows, encoder, options, key = job
    sha = hash_tokenizer(tokenizer)
    others = [
        cache_key(rows, Encoder(tokenizer, load_template("alpaca_legacy")), options, {3}, sha),
        cache_key(rows, Encoder(tokenizer, load_template("alpaca"), 100), options, {3}, sha),
        cache_key(rows, Encoder(tokenizer, load_template("alpaca"), train_on_inputs=True), options, {3}, sha),
        cache_key(rows, Encoder(tokenizer, load_template("alpaca"), add_eos_token=False), options, {3}, sha),
        cache_key(rows, Encoder(tokenizer, load_template("alpaca"), train_on="last"), options, {3}, sha),
        cache_key(rows, encoder, DataOptions(overlong="drop"), {3}, sha),
        cache_key(rows, encoder, options, {4}, sha),
        cache_key(rows, encoder, options, {3}, "another tokenizer"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps([*numbered(9), ROW]))
    others.append(cache_key(Rows(str(tmp_path / "rows.json")), encoder, options, {3}, sha))
    assert len({key, *others}) == 1 + len(others)
    assert cache_key(rows, Encoder(tokenizer, load_template("alpaca")), DataOptions(), {3}, sha) == key


def test_only_the_newest_are_kept_and_nothing_of_others_is_removed(job, tmp_path):
    rows, encoder, options, _ = job
    fresh = prepare(rows, encoder, options, set(), lambda done: None)
    cache = tmp_path / "cache"
    (cache / ("f" * 64)).mkdir(parents=True)  # a name like ours, and nothing of ours in it
    for number in range(KEPT + 3):
        keep(cache, f"{number:064}", fresh)
        os.utime(cache / f"{number:064}", (number, number))
    left = sorted(path.name for path in cache.iterdir())
    assert left == [*(f"{number:064}" for number in range(3, KEPT + 3)), "f" * 64]


def test_a_cache_that_cannot_be_written_is_none(job, tmp_path):
    rows, encoder, options, key = job
    fresh = prepare(rows, encoder, options, set(), lambda done: None)
    (tmp_path / "file").write_text("")
    assert keep(tmp_path / "file" / "cache", key, fresh) is fresh
    assert keep(None, key, fresh) is fresh


def test_a_second_run_finds_its_rows_prepared(data_path, tiny_llama, tmp_path, monkeypatch):
    from command import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_alpaca.data.cache.CACHED_FROM", 10)
    words = ["--base_model", tiny_llama, "--data_path", data_path, "--max_steps", 2, "--batch_size", 4, "--seed", 1]
    words += ["--load_8bit", "False", "--dtype", "fp32", "--cache_dir", "prepared"]
    first = run("finetune", *words)
    assert "prepared rows found" not in first.out
    second = run("finetune", *words)
    assert "prepared rows found in prepared" in second.out
    one, two = (
        folder.joinpath("adapter_model.safetensors").read_bytes()
        for folder in map(tmp_path.joinpath, ("lora-alpaca", "lora-alpaca.1"))
    )
    assert one == two


def test_the_garbage_collector_is_back_after_an_error(prepared):
    import gc

    with pytest.raises(DataError):
        prepared([ROW, LONG], overlong="error")
    assert gc.isenabled()
