"""Hidden states that are computed once: the losses of all layers computed in every step, or a reason why not."""

import json
import os
import shutil

import pytest
import torch
from command import refused
from conftest import as_row
from short_run import flags, interrupt, tensors

from lora_alpaca import FinetuneConfig, finetune

CLOSE = 1e-6  # relative, of losses in fp32


@pytest.fixture
def train(tmp_path, tiny_llama, rows, capsys):
    """Return `train(name, **options)`: the result of a short run, its folder's name, and what it printed."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([as_row(row) for row in rows[:24]]))

    def make(name, **options):
        chosen = {
            "base_model": str(tiny_llama), "data_path": str(path), "output_dir": str(tmp_path / name),
            "batch_size": 4, "max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "val_set_size": 4,
            "learning_rate": 2e-2, "load_8bit": False, "dtype": "fp32", "device": "cpu", "layers": "top:1",
            "cache_dir": str(tmp_path / "cache"), "report": False, "save_total_limit": 9,
        } | options  # fmt: skip
        found = finetune(FinetuneConfig(**chosen))
        return found, capsys.readouterr().out

    return make


def losses(result):
    return [
        (entry["step"], key, entry[key])
        for entry in result.history
        for key in ("loss", "validation_loss")
        if key in entry
    ]


def cached(tmp_path):
    (folder,) = (tmp_path / "cache").glob("hidden-*")
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"load_8bit": True}, {"tune": "full"}, {"lora_dropout": 0.3}, {"num_epochs": 1, "share_prefix": False}],
    ids=str,
)
def test_losses_are_those_of_all_layers(train, options):
    (plain, _), (read, said) = train("plain", **options), train("read", cache_hidden=True, **options)
    assert "hidden states of 1 of 2 layers for 24 rows" in said
    assert read.first_validation_loss == pytest.approx(plain.first_validation_loss, rel=CLOSE)
    for one, other in zip(losses(read), losses(plain), strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=20 * CLOSE)  # steps carry differences on
    assert losses(read)[0][2] == pytest.approx(losses(plain)[0][2], rel=CLOSE)


def test_in_16_bits_the_states_are_kept_as_they_are(train):
    (plain, _), (read, said) = train("plain", dtype="bf16"), train("read", dtype="bf16", cache_hidden=True)
    assert "hidden states of 1 of 2" in said
    assert read.first_validation_loss == pytest.approx(plain.first_validation_loss, rel=1e-2)


def test_a_later_run_finds_them_and_ends_with_the_same_bits(train, tmp_path):
    first, said = train("one", cache_hidden=True)
    assert "computed in" in said
    second, said = train("two", cache_hidden=True)
    assert "found in" in said
    assert all(
        torch.equal(one, other)
        for one, other in zip(tensors(first.output_dir).values(), tensors(second.output_dir).values(), strict=True)
    )
    assert os.stat(cached(tmp_path)).st_mode & 0o077 == 0 or os.stat(tmp_path / "cache").st_mode & 0o077 == 0


def test_a_resumed_run_computes_the_same_states_again(train, tmp_path):
    whole, _ = train("whole", cache_hidden=True)
    kept = tensors(whole.output_dir)
    interrupt(whole.output_dir, 2)
    for file in cached(tmp_path).iterdir():
        file.unlink()
    cached(tmp_path).rmdir()
    resumed, said = train("whole", cache_hidden=True, resume=True)
    assert "computed in" in said
    assert all(torch.equal(one, tensors(resumed.output_dir)[name]) for name, one in kept.items())


@pytest.mark.parametrize("damage", ["short", "unmarked"])
def test_what_is_not_whole_is_computed_again(train, tmp_path, damage):
    train("one", cache_hidden=True)
    if damage == "short":
        os.truncate(cached(tmp_path) / "states", 100)
    else:
        (cached(tmp_path) / "whole.json").unlink()
    read, said = train("two", cache_hidden=True)
    plain, _ = train("plain")
    assert "computed in" in said and read.validation_loss == pytest.approx(plain.validation_loss, rel=20 * CLOSE)


def test_other_rows_and_other_bits_have_other_states(train, tmp_path, rows):
    train("one", cache_hidden=True)
    other = tmp_path / "other.json"
    other.write_text(json.dumps([as_row(row) for row in rows[1:25]]))
    for options in ({"data_path": str(other)}, {"load_8bit": True}):
        _, said = train("two", cache_hidden=True, overwrite=True, **options)
        assert "computed in" in said
    assert len(list((tmp_path / "cache").glob("hidden-*"))) == 3


def test_the_oldest_go_where_all_together_are_too_large(train, tmp_path, rows):
    train("one", cache_hidden=True)
    size = (cached(tmp_path) / "states").stat().st_size
    train("two", cache_hidden=True, load_8bit=True, cache_gb=1.5 * size / 1e9)
    assert len(list((tmp_path / "cache").glob("hidden-*"))) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_gb": 1e-6}, "and --cache_gb is 1e-06"),
        ({"cache_dir": "none"}, "--cache_dir is none"),
        ({"engine": "padded"}, "its rows are not computed in packs"),
    ],
    ids=str,
)
def test_without_them_a_run_goes_on_and_says_why(train, options, reason):
    plain, _ = train("plain", **options)
    read, said = train("read", cache_hidden=True, **options)
    assert "--cache_hidden: " in said and reason in said and "every layer is computed in every step" in said
    assert losses(read) == losses(plain)


def test_a_model_that_cannot_be_split_is_told(train, tiny_model, tmp_path):
    """GPT-2 drops out of what does not learn; and it adds positions to whatever it takes for embeddings."""
    folder = tmp_path / "gpt"
    shutil.copytree(tiny_model("GPT2"), folder)
    _, said = train("one", cache_hidden=True, base_model=str(folder), max_steps=2)
    assert "it has a dropout of its own: attn_pdrop 0.1" in said
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}))
    read, said = train("two", cache_hidden=True, base_model=str(folder), max_steps=2)
    assert "off that of all layers" in said and read.steps == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "say --layers top:N too"),
        ({"layers": "top:1", "neftune_alpha": 5}, "--neftune_alpha changes what"),
        ({"layers": "top:1", "shard": "full", "processes": 2}, "--cache_hidden reads whole layers"),
    ],
    ids=str,
)
def test_what_cannot_go_together_is_refused(options, reason):
    assert reason in refused("finetune", *flags({"cache_hidden": True, **options}))
