"""The catalogue of bad inputs, flags (C): a wrong one is refused in one line, before anything heavy or written.

The whole command line runs, in this process.
"""

import shutil
from typing import get_args

import pytest
from command import run
from entries import SHORT, cases, entry, launched, line_of

from lora_alpaca.cli.flags import parse
from lora_alpaca.config import FinetuneConfig, GenerateConfig

pytestmark = pytest.mark.usefixtures("here")  # an empty folder, where nothing may be written and no model loaded

BAD_FLAGS = [
    ("C58", ["--learnig_rate", "1e-5"], "unknown flag --learnig_rate; did you mean --learning_rate?"),
    ("C58", ["--lora_ranks=4"], "unknown flag --lora_ranks; did you mean --lora_"),
    ("C58", ["--fp16"], "flags of other trainers: --fp16 True is --dtype fp16"),
    ("C59", ["extra"], "stray word 'extra'; every option is --name value"),
    ("C59", ["--seed", "1", "data.json"], "stray word 'data.json'"),
    ("C60", ["--num_epochs"], "--num_epochs needs a value: --num_epochs NUMBER"),
    ("C60", ["--base_model", "--resume"], "--base_model needs a value: --base_model TEXT"),
    ("C61", ["--load_8bit", "maybe"], "--load_8bit maybe: input should be a valid boolean"),
    ("C63", ["--learning_rate", "abc"], "--learning_rate abc: input should be a valid number"),
    ("C63", ["--learning_rate", "nan"], "--learning_rate nan: input should be a finite number"),
    ("C63", ["--learning_rate", "inf"], "--learning_rate inf: input should be a finite number"),
    ("C63", ["--learning_rate", "0"], "--learning_rate 0: input should be greater than 0"),
    ("C63", ["--learning_rate", "-1e-4"], "--learning_rate -1e-4: input should be greater than 0"),
    ("C63", ["--learning_rate", "3e4"], "--learning_rate 3e4: input should be less than or equal to 1"),
    ("C64", ["--seed", "1", "--seed", "2"], "--seed is given twice; once is enough"),
    ("C65", ["--batch_size", "10", "--micro_batch_size", "4"], "no multiple of --micro_batch_size 4; nearest: 8 or 12"),
    ("C66", ["--batch_size", "2", "--micro_batch_size", "4"], "no multiple of --micro_batch_size 4; nearest: 4"),
    ("C68", ["--cutoff_len", "0"], "--cutoff_len 0: input should be greater than or equal to 2"),
    ("C68", ["--cutoff_len", "1"], "--cutoff_len 1: input should be greater than or equal to 2"),
    ("C69", ["--lora_r", "0"], "--lora_r 0: input should be greater than or equal to 1"),
    ("C69", ["--lora_r", "-1"], "--lora_r -1: input should be greater than or equal to 1"),
    ("C70", ["--lora_alpha", "0"], "--lora_alpha 0: input should be greater than 0"),
    ("C72", ["--lora_target_modules", "[]"], "--lora_target_modules"),
    ("C73", ["--lora_dropout", "1.5"], "--lora_dropout 1.5: input should be less than 1"),
    ("C73", ["--lora_dropout", "1.0"], "--lora_dropout 1.0: input should be less than 1"),
    ("C73", ["--lora_dropout", "nan"], "--lora_dropout nan: input should be a finite number"),
    ("C74", ["--num_epochs", "0"], "--num_epochs 0: input should be greater than 0"),
    ("C74", ["--max_steps", "0"], "--max_steps 0: input should be greater than or equal to 1"),
    ("C74", ["--max_minutes", "0"], "--max_minutes 0: input should be greater than 0"),
    ("C74", ["--max_cost", "2"], "--max_cost 2: say what an hour costs with --price_per_hour"),
    ("C75", ["--seed", "-1"], "--seed -1: input should be greater than or equal to 0"),
    ("C75", ["--seed", "99999999999999999999"], "--seed 99999999999999999999: input should be less than 4294967296"),
    ("C76", ["--load_8bit", "--load_4bit"], "--load_8bit and --load_4bit exclude each other; choose one"),
    ("C76", ["--dtype", "fp16,bf16"], "--dtype fp16,bf16: input should be 'auto', 'bf16', 'fp16' or 'fp32'"),
    ("C77", ["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: no such folder"),
]


@cases(BAD_FLAGS, "words, said")
def test_a_bad_flag_is_refused(words, said):
    assert said in line_of("finetune", *words)


@entry("C61")
def test_words_for_false_are_false(number):
    for word in ("false", "False", "no", "0", "off"):
        assert parse(FinetuneConfig, ["--load_8bit", word]).load_8bit is False


@entry("C62")
@pytest.mark.parametrize("name", ["123", "1e5", "[a", "{'a': 1}", "None"])
def test_a_name_stays_as_it_was_typed(number, name, data_path):
    assert parse(FinetuneConfig, ["--base_model", name]).base_model == name
    line = line_of("finetune", "--base_model", name, "--data_path", data_path, code=1)
    assert line.startswith(
        f"error: --base_model {name}: no folder of this name here, and the hub gives none (HF_HUB_OFFLINE is set): "
    )


WHOLE = [
    (config_class, name)
    for config_class in (FinetuneConfig, GenerateConfig)
    for name, field in config_class.model_fields.items()
    if field.annotation is int or int in get_args(field.annotation)
]


@entry("C67")
@pytest.mark.parametrize(("config_class", "name"), WHOLE, ids=[name for _, name in WHOLE])
def test_a_whole_number_is_one_and_not_too_small(number, config_class, name):
    verb = "finetune" if config_class is FinetuneConfig else "generate"
    zero = () if name in ("warmup_steps", "seed", "top_k", "max_waiting", "report_rows", "report_answers") else ("0",)
    for value in ("-1", "2.5", "many", *zero):
        assert f"--{name} {value}: input should be " in line_of(verb, f"--{name}", value)


@entry("C68")
def test_rows_longer_than_the_model_takes(number, tiny_llama, data_path):
    words = ("--base_model", tiny_llama, "--data_path", data_path, "--load_8bit", "False")
    line = line_of("finetune", *words, "--cutoff_len", 513)
    assert line == f"error: --cutoff_len 513: {tiny_llama} takes at most 512 tokens"


ODD = [
    ("C63", ["--learning_rate", "0.5"], "warning: --learning_rate 0.5 is very high; LoRA is trained with about 3e-4"),
    ("C70", ["--lora_r", "65"], "warning: --lora_r 65 is more than the model is wide (64), which gains nothing"),
]


@cases(ODD, "words, said")
def test_what_is_odd_is_warned_about(words, said, tiny_llama, data_path, model_loads):
    result = run("finetune", "--base_model", tiny_llama, "--data_path", data_path, *SHORT, *words)
    assert result.code == 0, result.err
    assert said in result.out.splitlines()


TARGETS = [
    (
        "C71",
        "qq_proj",
        "--lora_target_modules qq_proj: the model has no such module; it has down_proj, gate_proj",
    ),
    ("C71", "q_proj,value", "--lora_target_modules value: the model has no such module; it has down_proj, gate_proj"),
    ("C72", "q_proj v_proj", "--lora_target_modules q_proj v_proj: the model has no such module"),
    ("C72", ".*_proj_", "--lora_target_modules .*_proj_: the model has no such module"),
]


@cases(TARGETS, "names, said")
def test_target_modules_that_are_not_there(names, said, tiny_llama, data_path):
    words = ("--base_model", tiny_llama, "--data_path", data_path, *SHORT)
    assert said in line_of("finetune", *words, "--lora_target_modules", names, code=1)


@entry("C72")
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("['q_proj','v_proj']", ["q_proj", "v_proj"]),
        ("(q_proj,v_proj)", ["q_proj", "v_proj"]),
        ("all-linear", ["all-linear"]),
        (r".*\.layers\.1\..*(q_proj|v_proj)", [r".*\.layers\.1\..*(q_proj|v_proj)"]),
        (r"(q_proj|v_proj)", [r"(q_proj|v_proj)"]),
        (r".*layers\.\d{1,2}\.[^,]*q_proj, v_proj", [r".*layers\.\d{1,2}\.[^,]*q_proj", "v_proj"]),
        (r"['.*\.0\..*q_proj', 'v_proj']", [r".*\.0\..*q_proj", "v_proj"]),
    ],
    ids=["plain", "in brackets", "quoted", "in parentheses", "all", "expression", "bare expression", "comma", "list"],
)
def test_a_list_is_read_as_one(number, typed, meant):
    assert parse(FinetuneConfig, ["--lora_target_modules", typed]).lora_target_modules == meant


@entry("C77")
def test_resuming_from_what_is_no_checkpoint(number, here):
    (here / "folder").mkdir()
    assert line_of("finetune", "--resume_from_checkpoint", "folder").startswith(
        "error: --resume_from_checkpoint folder: holds no checkpoint"
    )


ALONE = [
    ("C79", {"WORLD_SIZE": "2"}, "2 processes were launched, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
    (
        "C79",
        {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"},
        "but MASTER_ADDR, MASTER_PORT not set; start with",
    ),
    ("C79", {"LOCAL_RANK": "0"}, "but RANK, MASTER_ADDR, MASTER_PORT not set"),
    ("C79", {"WORLD_SIZE": "two"}, "the variable WORLD_SIZE is 'two', no number of processes"),
    ("C79", {"WORLD_SIZE": "0"}, "the variable WORLD_SIZE is '0', no number of processes"),
]


@cases(ALONE, "variables, said")
def test_variables_of_a_launcher_that_is_not_there(variables, said, monkeypatch):
    launched(monkeypatch, **variables)
    assert said in line_of("finetune")


@entry("C79")
def test_a_rank_that_there_cannot_be(number, monkeypatch):
    launched(monkeypatch, WORLD_SIZE="2", RANK="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    assert "the variable RANK is '2', and WORLD_SIZE is 2; start with torchrun" in line_of("finetune")


@entry("C80")
def test_an_output_folder_that_is_the_base_or_holds_the_data(number, here, tiny_llama, data_path):
    base = shutil.copytree(tiny_llama, here / "base")
    shutil.copy(data_path, here / "rows.json")
    (here / "data").mkdir()
    shutil.copy(data_path, here / "data" / "rows.json")
    for out, words in {
        "base": ("--base_model", base),
        "./data/../base/": ("--base_model", "base"),
        "rows.json": ("--data_path", "rows.json"),
        "data": ("--data_path", "data/rows.json"),
        "data/": ("--data_path", "rows.json,data/rows.json"),
    }.items():
        assert f"--output_dir {out} is, or holds, {words[0]} " in line_of("finetune", *words, "--output_dir", out)
