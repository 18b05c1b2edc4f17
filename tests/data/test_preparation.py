import json
import os
from dataclasses import fields

import pytest

from lora_alpaca.config.shared import DataOptions
from lora_alpaca.data import Rows, preparation
from lora_alpaca.data.cache import KEPT, cache_folder, cache_key, cached, keep
from lora_alpaca.data.encoding import Choices, Encoder
from lora_alpaca.data.examples import IGNORED, Builder, Example, Examples
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
        encoder = Encoder.from_options(tokenizer, load_template(template).bound(tokenizer), options)
        rows = Rows(str(path), skip_bad_rows=options.skip_bad_rows)
        return prepare(rows, encoder, set(held_out), lambda done: None)

    return make


def numbered(count):
    return [ROW | {"output": f"Hello {number}."} for number in range(count)]


# --------------------------------------------------------------------------------------------------------- examples


def test_examples_are_what_was_added():
    builder = Builder()
    rows = [Example([5, 6, 7, 8], [(1, 2), (3, 4)]), Example([9], [])]
    for row in rows:
        builder.add(row)
    examples = builder.build()
    assert list(examples) == rows
    assert examples[0].labels == [IGNORED, 6, IGNORED, 8]
    assert examples.lengths.tolist() == [4, 1]
    assert examples[-1] == rows[-1]
    assert examples[0:2] == rows
    with pytest.raises(IndexError):
        examples[2]


def test_examples_are_mapped_as_they_were_saved(tmp_path):
    builder = Builder()
    for number in range(50):
        builder.add(Example(range(number + 1), [(number // 2, number + 1)]))
    examples = builder.build()
    examples.save(tmp_path, "train")
    assert list(Examples.mapped(tmp_path, "train")) == list(examples)
    Builder().build().save(tmp_path, "validation")
    assert list(Examples.mapped(tmp_path, "validation")) == []


def test_a_file_that_was_cut_short_is_not_whole(tmp_path):
    builder = Builder()
    builder.add(Example([1, 2, 3], [(0, 3)]))
    builder.build().save(tmp_path, "train")
    assert Examples.mapped(tmp_path, "train").is_whole()
    (tmp_path / "train.ids").write_bytes((tmp_path / "train.ids").read_bytes()[:-4])
    assert not Examples.mapped(tmp_path, "train").is_whole()


def test_documents_are_put_end_to_end_and_cut_to_blocks():
    builder = Builder(block=4)
    for ids in ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]):
        builder.add(Example(ids, []))
    blocks = [row.ids.tolist() for row in builder.build()]
    assert blocks == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert all(row.labels == row.ids.tolist() for row in builder.build())


def test_a_block_has_the_number_of_the_row_that_it_begins_in():
    builder = Builder(block=4)
    for number, length in enumerate((3, 1, 2, 11, 1)):  # blocks of rows 0 and 1; 2 and 3; 3; 3; and 3 and 4
        builder.add(Example(range(length), []), number)
    assert builder.build().numbers.tolist() == [0, 2, 3, 3, 3]


def test_examples_know_their_rows(prepared):
    rows = [ROW, ROW | {"output": "x " * 300}, LONG, ROW | {"output": "b"}]
    assert prepared(rows, overlong="drop").train.numbers.tolist() == [0, 3]


# ------------------------------------------------------------------------------------------- what becomes of the rows


def test_a_long_answer_is_cut_and_counted(prepared, tokenizer):
    found = prepared([LONG, ROW])
    assert len(found.train[0].ids) == 100
    assert found.train[0].labels[-1] not in (IGNORED, tokenizer.eos_token_id)
    assert found.train[1].labels[-1] == tokenizer.eos_token_id
    statistics = found.statistics
    assert (statistics.truncated.count, statistics.truncated.first) == (1, ["rows.json:1"])
    assert statistics.ends_lost.count == 1
    assert any("1 of 2 rows (50.0%) are longer than --cutoff_len 100" in line for line in statistics.lines())


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
    assert len(found.train[0].ids) < 200
    assert (found.statistics.truncated.count, found.statistics.ends_lost.count) == (1, 1)


def test_held_out_rows_are_validation(prepared):
    found = prepared(numbered(5), held_out=[1, 3])
    everything = prepared(numbered(5))
    assert list(found.validation) == [everything.train[1], everything.train[3]]
    assert list(found.train) == [everything.train[n] for n in (0, 2, 4)]


def test_rows_to_validate_on_may_be_those_of_another_file(prepared, tokenizer, tmp_path):
    """A long answer is cut in both; the training part is what it is without the file, in blocks too."""
    path = tmp_path / "val.json"
    path.write_text(json.dumps([LONG, numbered(3)[2], ROW]))
    template = load_template("alpaca_short").bound(tokenizer)
    encoder = Encoder.from_options(tokenizer, template, DataOptions(cutoff_len=100))
    alone = prepared(numbered(5))
    found = prepare(Rows(str(tmp_path / "rows.json")), encoder, set(), lambda done: None, Rows(str(path)))
    assert list(found.train) == list(alone.train)
    assert list(found.validation) == list(prepared([LONG, numbered(3)[2], ROW]).train)
    statistics = found.statistics
    assert (statistics.read, statistics.train, statistics.validation) == (8, 5, 3)
    assert (statistics.truncated.first, statistics.shared.first) == (["val.json:1"], ["val.json:2"])


def test_documents_stay_blocks_beside_rows_to_validate_on(prepared, tokenizer, tmp_path):
    documents = [{"text": "The owl hoots. " * 30}, {"text": "Short."}]
    alone = prepared(documents, template="plain")
    path = tmp_path / "val.json"
    path.write_text(json.dumps([{"prompt": "The owl", "completion": " hoots."}]))
    encoder = Encoder.from_options(tokenizer, load_template("plain").bound(tokenizer), DataOptions(cutoff_len=100))
    found = prepare(Rows(str(tmp_path / "rows.json")), encoder, set(), lambda done: None, Rows(str(path)))
    assert list(found.train) == list(alone.train)
    assert len(found.validation) == 1
    assert found.validation[0].labels[0] == IGNORED


def test_many_chunks_are_one(prepared, monkeypatch):
    whole = prepared(numbered(25), held_out=[7, 20])
    monkeypatch.setattr(preparation, "CHUNK", 4)
    chunked = prepared(numbered(25), held_out=[7, 20])
    assert list(whole.train) == list(chunked.train)
    assert list(whole.validation) == list(chunked.validation)
    assert whole.statistics == chunked.statistics


def test_documents_become_blocks(prepared, tokenizer):
    found = prepared([{"text": "The owl hoots. " * 30}, {"text": "Short."}], template="plain")
    assert [len(row.ids) for row in found.train][:-1] == [100] * (len(found.train) - 1)
    ids = [token for row in found.train for token in row.ids.tolist()]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert ids.count(tokenizer.bos_token_id) == 2
    assert all(row.labels == row.ids.tolist() for row in found.train)


def talk(*answers):
    turns = [[{"role": "user", "content": "Hi."}, {"role": "assistant"} | answer] for answer in answers]
    return {"messages": [turn for pair in turns for turn in pair]}


def test_rows_without_an_answer_to_learn_are_dropped_and_answers_that_are_only_seen_are_counted(prepared):
    seen, learned = {"content": "No.", "weight": 0}, {"content": "Yes."}
    found = prepared(
        [talk(learned), talk(seen, learned), talk(seen, seen), talk(seen)], template="vicuna", cutoff_len=400
    )
    statistics = found.statistics
    assert (statistics.unlearned.count, statistics.unlearned.first[0]) == (2, "rows.json:3")
    assert (statistics.only_seen.count, statistics.only_seen.first[0]) == (1, "rows.json:2")
    assert (len(found.train), statistics.dropped()) == (2, 2)
    assert any(
        "2 of 4 rows (50.0%) have no answer to learn (weight 0, train false)" in line for line in statistics.lines()
    )
    assert [len(example.spans) for example in found.train] == [1, 1]
    with pytest.raises(DataError, match=r"2 of 2 rows are dropped \(first: rows\.json:1\)"):
        prepared([talk(seen), talk(seen, seen)], template="vicuna")


def test_a_row_may_be_several_examples_which_stay_on_its_side(tiny_llama, prepared, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", (
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{% if m.role == 'assistant' %}{{ '!' if loop.last }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ))  # fmt: skip
    rows = [talk({"content": "One."}, {"content": "Two."}), talk({"content": "Three."})]
    found = prepared(rows, held_out=[0], template="chat")
    assert (len(found.train), len(found.validation)) == (1, 2)
    assert (found.statistics.read, found.statistics.validation) == (2, 2)
    assert (found.statistics.turn_by_turn.count, found.statistics.turn_by_turn.first) == (1, ["rows.json:1"])
    learned = [tokenizer.decode(row.ids[first:last]) for row in found.validation for first, last in row.spans]
    assert learned == ["One.!</s>", "Two.!</s>"]
    whole = prepared(rows, template="chat").train.lengths.max()
    short = prepared(rows, template="chat", cutoff_len=int(whole) - 1)  # the longer example of the first row is cut
    assert (short.statistics.truncated.count, len(short.train)) == (1, 3)
    short = prepared(rows, template="chat", cutoff_len=int(whole) - 1, overlong="drop")
    assert (short.statistics.overlong.count, len(short.train)) == (1, 2)


def test_the_statistics_count(prepared, tokenizer):
    rows = [
        *numbered(6),
        numbered(1)[0],
        ROW | {"output": ""},
        ROW | {"instruction": " "},
        ROW | {"output": "</s>"},
        {},
    ]
    found = prepared(rows, held_out=[0, 3], skip_bad_rows=True)
    statistics = found.statistics
    assert (statistics.read, statistics.train, statistics.validation) == (11, 8, 2)
    assert statistics.formats == {"Alpaca": 10}
    assert statistics.shared.count == 1  # the other held out row is nowhere else
    assert (statistics.bad.first, statistics.duplicates.first, statistics.shared.first) == (
        ["rows.json:11"], ["rows.json:7"], ["rows.json:1"],
    )  # fmt: skip
    assert statistics.empty_answers.first == ["rows.json:8"]
    assert statistics.blank_instructions.first == ["rows.json:9"]
    assert (statistics.control_text.first, statistics.control_text.example) == (["rows.json:10"], "</s>")
    assert statistics.tokens == sum(len(row.ids) for row in found.train)
    assert statistics.learned == sum(label != IGNORED for row in found.train for label in row.labels)
    assert statistics.percentiles["longest"] == max(map(len, (row.ids for row in found.train)))
    assert Statistics.from_json(json.loads(json.dumps(statistics.to_json()))) == statistics
    older = statistics.to_json() | {"other_ids": {"count": 2, "first": ["rows.json:1"], "example": "'a|b'"}}
    assert Statistics.from_json(older) == statistics  # saved by a version that counted more
    said = "\n".join(statistics.lines())
    for words in ("cannot be used", "exact doubles", "both the training and", "empty answer", "blank instruction"):
        assert words in said
    assert all("\n" not in line for line in statistics.lines())


@pytest.mark.parametrize(
    ("given", "limits", "flag"),
    [
        ([LONG, ROW], (0.4, None, None), "max_truncated 0.4: 1 of 2 rows (50.0%) are truncated"),
        ([ROW, ROW, {}], (None, 0.3, None), "max_dropped 0.3: 1 of 3 rows (33.3%) are dropped"),
        ([ROW, ROW], (None, None, 0.0), "max_duplicates 0.0: 1 of 2 rows (50.0%) are exact doubles"),
    ],
)
def test_a_gate_turns_a_share_into_an_error(prepared, given, limits, flag):
    statistics = prepared(given, skip_bad_rows=True).statistics
    with pytest.raises(DataError) as error:
        statistics.check(*limits)
    assert flag in str(error.value)
    assert "\n" not in str(error.value)
    statistics.check(*(None if limit is None else 0.5 for limit in limits))
    statistics.check(None, None, None)


# ------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def job(tokenizer, tmp_path):
    """Return rows, encoder and key of a data set, ready for the cache."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(numbered(10)))
    encoder = Encoder(tokenizer, load_template("alpaca"), Choices())
    rows = Rows(str(path))
    return rows, encoder, cache_key(rows, encoder, {3}, hash_tokenizer(tokenizer))


def test_the_cache_gives_back_what_it_was_given(job, tmp_path):
    rows, encoder, key = job
    fresh = prepare(rows, encoder, {3}, lambda done: None)
    assert cached(tmp_path / "cache", key) is None
    kept = keep(tmp_path / "cache", key, fresh)
    again = cached(tmp_path / "cache", key)
    for found in (kept, again):
        assert list(found.train) == list(fresh.train)
        assert list(found.validation) == list(fresh.validation)
        assert found.statistics == fresh.statistics
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [key]
    assert (tmp_path / "cache" / key).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["ids", "starts", "ledger.json"])
def test_a_damaged_cache_is_none_and_is_made_anew(job, tmp_path, damage):
    rows, encoder, key = job
    fresh = prepare(rows, encoder, {3}, lambda done: None)
    keep(tmp_path / "cache", key, fresh)
    file = next((tmp_path / "cache" / key).glob(f"*{damage}"))
    file.write_bytes(file.read_bytes()[:-8])
    assert cached(tmp_path / "cache", key) is None
    assert list(keep(tmp_path / "cache", key, fresh).train) == list(fresh.train)


def test_the_key_is_of_everything_that_matters(job, tokenizer, tmp_path):
    rows, encoder, key = job
    sha = hash_tokenizer(tokenizer)
    alpaca, legacy = load_template("alpaca"), load_template("alpaca_legacy")
    changes = {"cutoff_len": 9, "overlong": "drop", "train_on_inputs": True, "train_on": "last", "add_eos_token": False}
    changes |= {"train_on_reasoning": False}
    assert changes.keys() == {name.name for name in fields(Choices)}
    changed = [Choices(**{name: value}) for name, value in changes.items()]
    others = [cache_key(rows, Encoder(tokenizer, alpaca, choices), {3}, sha) for choices in changed]
    others += [
        cache_key(rows, Encoder(tokenizer, legacy, Choices()), {3}, sha),
        cache_key(rows, encoder, {4}, sha),
        cache_key(rows, encoder, {3}, "another tokenizer"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps([*numbered(9), ROW]))
    others.append(cache_key(Rows(str(tmp_path / "rows.json")), encoder, {3}, sha))
    assert len({key, *others}) == 1 + len(others)
    assert cache_key(rows, Encoder(tokenizer, load_template("alpaca"), Choices()), {3}, sha) == key


def test_only_the_newest_are_kept_and_nothing_of_others_is_removed(job, tmp_path):
    rows, encoder, _ = job
    fresh = prepare(rows, encoder, set(), lambda done: None)
    cache = tmp_path / "cache"
    (cache / ("f" * 64)).mkdir(parents=True)  # a name like ours, and nothing of ours in it
    for number in range(KEPT + 3):
        keep(cache, f"{number:064}", fresh)
        os.utime(cache / f"{number:064}", (number, number))
    left = sorted(path.name for path in cache.iterdir())
    assert left == [*(f"{number:064}" for number in range(3, KEPT + 3)), "f" * 64]


def test_a_cache_that_cannot_be_written_is_none(job, tmp_path):
    rows, encoder, key = job
    fresh = prepare(rows, encoder, set(), lambda done: None)
    (tmp_path / "file").write_text("")
    assert keep(tmp_path / "file" / "cache", key, fresh) is fresh
    assert keep(None, key, fresh) is fresh


def test_a_cache_that_others_can_write_to_is_not_used_and_that_is_said(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    folder, notes = cache_folder(str(tmp_path / "cache"))
    assert folder is None
    assert notes == [
        f"warning: the cache {tmp_path / 'cache'} can be written to by other users; rows are not kept there, "
        "name another: --cache_dir"
    ]
    assert cache_folder(str(tmp_path / "new")) == (tmp_path / "new", [])
    assert cache_folder("none") == (None, [])


def test_what_a_killed_process_left_in_the_cache_is_removed(job, tmp_path):
    rows, encoder, key = job
    cache, fresh = tmp_path / "cache", prepare(rows, encoder, set(), lambda done: None)
    cache.mkdir()
    process = os.fork()
    if not process:
        os.replace = lambda *_, **__: os._exit(9)
        keep(cache, key, fresh)
    os.waitpid(process, 0)
    (left,) = cache.iterdir()
    assert left.name.startswith(f".{key}.partial-")
    keep(cache, key, fresh)
    assert [path.name for path in cache.iterdir()] == [key]


@pytest.mark.parametrize("name", ["key", "f" * 64])
@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "loop"])
def test_no_link_in_the_cache_is_followed(job, tmp_path, name, kind):
    rows, encoder, key = job
    fresh = prepare(rows, encoder, set(), lambda done: None)
    cache, theirs = tmp_path / "cache", tmp_path / "theirs"
    keep(theirs, key, fresh)
    before = {path: path.stat().st_mtime_ns for path in theirs.rglob("*")}
    link = cache / (key if name == "key" else name)
    leads_to = {"file": theirs / key / "train.ids", "folder": theirs / key, "dangling": theirs / "new", "loop": link}
    cache.mkdir()
    link.symlink_to(leads_to[kind])
    assert cached(cache, key) is None
    for number in range(KEPT + 2):
        keep(cache, f"{number:064}", fresh)
    kept = keep(cache, key, fresh)
    assert list(kept.train) == list(fresh.train)
    assert {path: path.stat().st_mtime_ns for path in theirs.rglob("*")} == before


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
