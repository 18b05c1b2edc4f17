"""`--config FILE`: options of a YAML or JSON file are as if they had been typed; what is wrong is named by its line."""

import json

import pytest
import short_run
from command import refused, run

from lora_alpaca.cli.flags import parse
from lora_alpaca.cli.verbs import VERBS
from lora_alpaca.config import EvaluateConfig, ExportConfig, FinetuneConfig, GenerateConfig
from lora_alpaca.errors import ConfigError

pytestmark = pytest.mark.usefixtures("here")


def written(text, name="run.yaml"):
    with open(name, "w", encoding="utf-8") as file:
        file.write(text)
    return name


def config(text, *words, name="run.yaml", of=FinetuneConfig):
    return parse(of, ["--config", written(text, name), *words])


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # without a dot, YAML 1.1 has a text here
        ("learning_rate: .0003", "learning_rate", 0.0003),
        ("seed: 0123", "seed", 123),  # an octal number
        ("max_steps: 1_0", "max_steps", 10),
        ("load_8bit: no", "load_8bit", False),
        ("load_4bit: on", "load_4bit", True),
        ("compile: TRUE", "compile", "true"),
        ("base_model: no", "base_model", "no"),  # what YAML 1.1 takes for false, of a name
        ("revision: 0123456", "revision", "0123456"),
        ("revision: 1.10", "revision", "1.10"),
        ("data_path: 2024-01-01", "data_path", "2024-01-01"),
        ("revision: 12:30", "revision", "12:30"),  # a number of base sixty
        ("data_path: [a.json, b.json]", "data_path", "a.json,b.json"),
        ("data_path:\n  - a.json\n  - b.json\n", "data_path", "a.json,b.json"),
        ("lora_target_modules: [q_proj, 'v{1,2}']", "lora_target_modules", ["q_proj", "v{1,2}"]),
        ("lora_target_modules: q_proj,v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora-r: 4  # as a flag may be typed", "lora_r", 4),
        ("val_set_size: ~", "val_set_size", None),
        ("base_model: 'null'", "base_model", "null"),
        ("seed:", "seed", 42),
        ("\ufeffseed: 7", "seed", 7),
        ("", "seed", 42),
        ("# nothing\n---\n", "seed", 42),
    ],
)
def test_a_value_is_the_text_that_stands_there(text, option, value):
    assert getattr(config(text), option) == value


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ('{"learning_rate": 1e-4}', "learning_rate", 1e-4),
        ('{"load_8bit": false}', "load_8bit", False),
        ('{"compile": true}', "compile", "true"),
        ('{"revision": 1.10}', "revision", "1.10"),
        ('{"lora_target_modules": ["q_proj", "v{1,2}"]}', "lora_target_modules", ["q_proj", "v{1,2}"]),
        ('{"val_set_size": null}', "val_set_size", None),
        ('{"data_path": "\\ud83e\\udd99.json"}', "data_path", "🦙.json"),
    ],
)
def test_json_is_read_alike(text, option, value):
    assert getattr(config(text, name="run.json"), option) == value


def test_only_what_the_file_has_is_set():
    assert config("seed: 7\nlora_r:\nval_set_size: null\n").model_fields_set == {"seed"}


def test_words_win_over_the_file():
    found = config("lora_r: 0\nseed: 7\n", "--lora_r", "16")
    assert (found.lora_r, found.seed) == (16, 7)


@pytest.mark.parametrize("of", [GenerateConfig, EvaluateConfig, ExportConfig])
def test_other_commands_take_one(of):
    assert config("lora_weights: there\nbase_model: demo\n", of=of).base_model == "demo"


def test_help_has_it_where_it_is_taken():
    for name, verb in VERBS.items():
        assert ("--config FILE" in run(name, "--help").out) is not bool(verb.config.positional)


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nlora_r: 0\n", "run.yaml:2: --lora_r 0: input should be greater than or equal to 1"),
        ("lora_r: 0\nseed: 1\ncutoff_len: x", "run.yaml:1,3: --cutoff_len x: input should be a valid integer"),
        ("lora_r: true", "run.yaml:1: --lora_r true: input should be a valid integer"),
        ("lora_r: ''", "run.yaml:1: --lora_r : input should be a valid integer"),
        ("seed: 1\nlearning_rat: 1", "run.yaml:2: unknown flag --learning_rat; did you mean --learning_rate?"),
        ("lora_weights: x", "run.yaml:1: --lora_weights is a flag of generate and evaluate and export only"),
        ("load_8bit: true\nload_4bit: yes", "run.yaml:1,2: --load_8bit and --load_4bit exclude each other"),
        ("seed: 1\nlora_r: 2\nseed: 3", "run.yaml:3: seed is given twice; line 1 has it too"),
        ("lora-r: 1\nlora_r: 2", "run.yaml:2: lora_r is given twice; line 1 has it too"),
        ("load_4bit:", "run.yaml:1: --load_4bit needs a value: load_4bit: true, or false"),
        ("lora_r: 4\n  x: 3", "run.yaml:2: not YAML: mapping values are not allowed here"),
        ("a: \x07", "--config run.yaml: not YAML: unacceptable character #x0007: special characters are not allowed"),
        ("lora_r: !!python/object/apply:os.system [x]", "run.yaml:1: the tag !!python/object/apply:os.system is not"),
        ("a: &x 1\nb: *x", "run.yaml:1: an alias (*name) is used; write the value itself"),
        ("seed: 1\n---\nseed: 2", "run.yaml:2: not YAML: but found another document"),
        ("- seed", "run.yaml:1: options are written as NAME: VALUE, one on a line"),
        ("seed", "run.yaml:1: options are written as NAME: VALUE, one on a line"),
        ("? [a]\n: 1", "run.yaml:1: a key that is no name of an option"),
        ("seed: {x: 1}", "run.yaml:1: seed has options below it; every option stands by itself, at the left"),
        ("data_path: [[a]]", "run.yaml:1: data_path is a list of more than words"),
        ("config: other.yaml", "run.yaml:1: a file of options names no other one"),
        ("a: " + "[" * 3000, "--config run.yaml: not YAML: nested too deeply"),
        ("# " + "x" * 2**20, "--config run.yaml: cannot be read (larger than 1 MB)"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(text, said):
    assert refused("finetune", "--config", written(text)).startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"lora_r": 0}', "run.json: --lora_r 0: input should be greater than or equal to 1"),
        ('{"weight_decay": NaN}', "run.json: --weight_decay NaN: input should be a finite number"),
        ('{"lora_r": true}', "run.json: --lora_r True: input should be a valid integer"),
        ('{"lora_r": 1, "lora_r": 2}', "run.json: lora_r is given twice"),
        ('{"lora_r": 1,\n"seed" 2}', "run.json:2: not JSON at column 8: Expecting ':' delimiter"),
        ('["lora_r"]', 'run.json: options are one object, {"NAME": VALUE, ...}'),
        ('{"seed": {"x": 1}}', "run.json: seed has options below it"),
        ('{"options": {"seed": 1}}', "run.json: unknown flag --options"),
    ],
)
def test_a_mistake_in_json_is_named_by_file_and_key(text, said):
    assert refused("finetune", "--config", written(text, "run.json")).startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.yaml", "--config none.yaml: No such file or directory"),
        (".", "--config .: a folder; name the file in it"),
        ("rows.toml", "--config rows.toml: options are read from .yaml, .yml and .json files"),
        ("/dev/null/x.yaml", "--config /dev/null/x.yaml: Not a directory"),
    ],
)
def test_a_file_that_is_none(name, said):
    assert refused("finetune", "--config", name) == f"error: {said}"


def test_a_file_of_bytes():
    with open("run.yaml", "wb") as file:
        file.write(b"\xff\xfe\x00")
    assert refused("finetune", "--config", "run.yaml").startswith("error: --config run.yaml: cannot be read ('utf-8'")


def test_it_needs_a_value_and_is_said_once():
    assert refused("finetune", "--config") == "error: --config needs a value: --config FILE"
    twice = refused("finetune", "--config", "a.yaml", "--config", "b.yaml")
    assert twice == "error: --config is given twice; once is enough"


def test_an_error_that_the_file_has_no_part_in_does_not_name_it():
    name = written("seed: 1")
    assert refused("finetune", "--config", name, "--lora_r", 0).startswith("error: --lora_r 0: input should be")


def test_a_command_with_few_words_takes_none():
    assert "unknown flag --config" in refused("compare", "a", "b", "--config", "x.yaml")


# ---------------------------------------------------------------------------------------------------- other trainers

LLAMA_FACTORY = """
### model
model_name_or_path: org/7b
### method
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
### dataset
dataset: rows.json
cutoff_len: 1024
overwrite_cache: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
bf16: true
"""
AXOLOTL = """
base_model: org/7b
load_in_8bit: true
datasets:
  - path: org/rows
    type: alpaca
val_set_size: 0.05
adapter: lora
sequence_len: 2048
sample_packing: true
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
wandb_project:
"""


def typed(text):
    """Return the flags that a flat file is."""
    lines = [line.split(": ") for line in text.splitlines() if ": " in line]
    return [word for name, value in lines for word in (f"--{name}", value)]


def test_a_file_of_another_trainer_is_answered_as_its_flags_are():
    by_flags = refused("finetune", *typed(LLAMA_FACTORY)).removeprefix("error: ")
    by_file = refused("finetune", "--config", written(LLAMA_FACTORY)).removeprefix("error: run.yaml:")
    assert by_file.split(": ", 1)[1] == by_flags


def test_datasets_of_another_trainer_are_told_by_their_paths():
    line = refused("finetune", "--config", written(AXOLOTL))
    assert "--datasets org/rows is --data_path org/rows;" in line
    assert "--gradient_accumulation_steps 4 is --micro_batch_size 2 --batch_size 8" in line


# ------------------------------------------------------------------------------------------------------------ records


@pytest.fixture(scope="module")
def trained(tiny_llama, rows, tmp_path_factory):
    """Return the folder of a short run; to be read, not written to."""
    folder = tmp_path_factory.mktemp("recorded")
    return short_run.adapter(folder, tiny_llama, rows, max_steps=2, lora_r=4, eval_steps=1, report=False)


@pytest.mark.parametrize("name", ["lora_alpaca.json", "lora_alpaca.private.json"])
def test_a_record_makes_the_same_run(trained, name, tmp_path, model_loads):
    record = json.loads((trained / "lora_alpaca.json").read_text())
    found = parse(FinetuneConfig, ["--config", str(trained / name)])
    assert found.model_fields_set == {*record["said"]} - {"output_dir"}
    assert found.data_path == str(trained.parent / "rows.json")
    done = run("finetune", "--config", trained / name, "--output_dir", tmp_path / "again")
    assert done.code == 0, done.err
    assert short_run.same(trained, tmp_path / "again")


def test_a_record_is_of_finetune_alone(trained):
    line = refused("generate", "--config", trained / "lora_alpaca.json")
    assert line.endswith("lora_alpaca.json: the record of a run, whose options are those of finetune")
    line = refused("finetune", "--config", trained)
    assert line == f"error: --config {trained}: a folder; the record of its run is {trained / 'lora_alpaca.json'}"


def test_a_record_without_its_public_half(trained, tmp_path):
    (tmp_path / "lora_alpaca.private.json").write_bytes((trained / "lora_alpaca.private.json").read_bytes())
    with pytest.raises(ConfigError, match=r"the former is needed, and is not beside it"):
        parse(FinetuneConfig, ["--config", str(tmp_path / "lora_alpaca.private.json")])


def test_a_record_with_an_option_out_of_range_is_refused(trained, tmp_path):
    record = json.loads((trained / "lora_alpaca.json").read_text())
    record["options"]["lora_r"] = 0
    (tmp_path / "lora_alpaca.json").write_text(json.dumps(record))
    line = refused("finetune", "--config", tmp_path / "lora_alpaca.json")
    assert line.endswith("lora_alpaca.json: --lora_r 0: input should be greater than or equal to 1")


def test_code_of_a_base_is_not_turned_on_by_a_record(trained, tmp_path, model_loads):
    record = json.loads((trained / "lora_alpaca.json").read_text())
    record["options"]["trust_remote_code"] = True
    record["said"].append("trust_remote_code")
    (tmp_path / "lora_alpaca.json").write_text(json.dumps(record))
    found = parse(FinetuneConfig, ["--config", str(tmp_path / "lora_alpaca.json")])
    assert not found.is_set("trust_remote_code") and found.trust_remote_code is False


def test_a_default_that_has_changed_since_is_that_of_the_record(trained, tmp_path):
    record = json.loads((trained / "lora_alpaca.json").read_text())
    record["options"]["weight_decay"] = 0.5
    (tmp_path / "lora_alpaca.json").write_text(json.dumps(record))
    assert parse(FinetuneConfig, ["--config", str(tmp_path / "lora_alpaca.json")]).weight_decay == 0.5
