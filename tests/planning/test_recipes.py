"""Recipes: which one a run has, what wins over it, and that a run resumes by the values, not by the name."""

import math
from pathlib import Path

import pytest
from command import refused, run

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.planning.recipes import NAMED, fill_defaults
from lora_alpaca.storage import output_folder

FAST = NAMED["fast"]


def filled(world_size: int = 1, **said):
    """Return the config of a base that is not the demo, and the notes."""
    return fill_defaults(FinetuneConfig(**({"base_model": "x", "data_path": "y"} | said)), world_size)


def test_a_named_recipe_sets_its_values_and_says_them_in_one_line():
    config, (note,) = filled(recipe="fast")
    assert {name: getattr(config, name) for name in FAST} == dict(FAST)
    assert note.startswith("recipe fast: lora_target_modules all-linear, lora_r 32, lora_alpha 64, ")
    assert filled(recipe="alpaca-lora")[1] == ["recipe alpaca-lora: the defaults of all flags"]
    assert filled()[1] == []


@pytest.mark.parametrize("name", [name for name in FAST if name != "lora_target_modules"])
def test_every_flag_given_by_hand_wins_whatever_its_value(name):
    default = FinetuneConfig.model_fields[name].default
    value = 0.5 if default is None else default  # the default itself, said by hand, is no default
    config, notes = filled(recipe="fast", **{name: value})
    assert getattr(config, name) == value
    assert f"{name} " not in notes[0]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [("warmup_ratio", {"warmup_steps": 5}), ("num_epochs", {"max_steps": 5}), ("num_epochs", {"max_minutes": 5})],
)
def test_a_recipe_gives_way_to_what_says_the_same_otherwise(recipe, said):
    assert not filled(recipe="fast", **said)[0].is_set(recipe)


def test_the_scale_of_the_adapter_stays_whatever_its_rank():
    scale = FAST["lora_alpha"] / FAST["lora_r"]
    assert filled(recipe="fast", lora_r=8)[0].lora_alpha / 8 == scale
    assert filled(recipe="fast", lora_r=16, use_rslora=True)[0].lora_alpha / math.sqrt(16) == scale
    assert filled(lora_r=32)[0].lora_alpha == 16  # as upstream has it


@pytest.mark.parametrize(
    ("ranks", "said", "batch"), [(3, {}, 6), (2, {}, 4), (8, {}, 8), (1, {"micro_batch_size": 3}, 6)]
)
def test_the_batch_of_a_recipe_fits_the_ranks(ranks, said, batch):
    config, _ = filled(ranks, recipe="fast", **said)
    assert config.batch_size == batch
    assert config.micro_batch(ranks) > 0


def test_the_demo_keeps_only_what_fits_its_rows_below_a_named_recipe():
    config, notes = fill_defaults(FinetuneConfig(recipe="fast"), 1)
    assert (config.learning_rate, config.batch_size, config.val_set_size) == (FAST["learning_rate"], 4, 100)
    assert notes[1:] == ["demo recipe: val_set_size 100"]
    assert fill_defaults(FinetuneConfig(recipe="alpaca-lora"), 1)[0].learning_rate == 3e-4
    assert fill_defaults(FinetuneConfig(), 1)[0].learning_rate == 5e-3


def test_the_shape_of_an_adapter_to_begin_from_is_its_own():
    config, notes = filled(recipe="fast", init_adapter="z")
    assert not {"lora_r", "lora_alpha", "lora_target_modules"} & config.model_fields_set
    assert config.learning_rate == FAST["learning_rate"]
    assert notes[-1] == "rank, scale and modules of the adapter are those of --init_adapter, not of the recipe"


def test_filling_in_twice_changes_nothing():
    once, _ = fill_defaults(FinetuneConfig(recipe="fast"), 2)
    assert fill_defaults(once, 2)[0] == once


def test_full_finetuning_has_a_recipe_of_its_own():
    assert "--recipe fast is of a LoRA adapter; leave it out" in refused(
        "finetune", "--tune", "full", "--recipe", "fast"
    )


def test_a_run_resumes_by_the_values_of_its_recipe(tiny_llama, data_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "--base_model",
        tiny_llama,
        "--data_path",
        data_path,
        "--val_set_size",
        "2",
        "--cutoff_len",
        "96",
        "--report",
        "False",
    ]
    ended = run("finetune", *words, "--recipe", "fast", "--max_steps", "2")
    assert ended.code == 0, ended.err
    assert ended.out.count("recipe fast: ") == 1
    options = output_folder.read_record(Path("lora-alpaca"))["options"]
    assert (options["recipe"], options["lora_r"], options["learning_rate"]) == ("fast", 32, 1e-3)
    by_hand = [
        part for name in options.keys() & FAST.keys() - {"num_epochs"} for part in (f"--{name}", _word(FAST[name]))
    ]
    for again in (["--recipe", "fast"], by_hand):
        resumed = run("finetune", *words, *again, "--max_steps", "2", "--resume")
        assert "this run is already finished" in resumed.out, resumed.err
    other = run("finetune", *words, "--max_steps", "2", "--resume")
    assert other.code == 2
    assert "learning_rate was 0.001 and is 0.0003" in other.err


def _word(value) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
