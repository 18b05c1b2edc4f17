import subprocess
import sys

import pytest
from command import refused, run

from lora_alpaca.cli.flags import parse
from lora_alpaca.cli.help import help_text
from lora_alpaca.config import ExportConfig, FinetuneConfig, GenerateConfig
from lora_alpaca.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learnig_rate", "1e-4"], "did you mean --learning_rate?"),
        (["--xyzzy", "1"], "--help lists them all"),
        (["--noresume"], "did you mean --resume?"),
        (["--batch_size"], "--batch_size needs a value: --batch_size WHOLE"),
        (["--batch_size", "--seed", "1"], "--batch_size needs a value"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["--seed", "1", "--seed=1"], "--seed is given twice"),
        (["extra"], "stray word 'extra'"),
        (["--seed", "1", "extra"], "stray word 'extra'"),
        (["-s", "1"], "stray word '-s'"),
        (["--"], "stray word '--'"),
        (["--batch_size", "many"], "--batch_size many: input should be a valid integer"),
        (["--batch_size", "0"], "--batch_size 0: input should be greater than or equal to 1"),
        (["--batch_size", "2.5"], "--batch_size 2.5: input should be a valid integer"),
        (["--learning_rate", "nan"], "--learning_rate nan: input should be a finite number"),
        (["--learning_rate", "-1"], "--learning_rate -1: input should be greater than 0"),
        (["--learning_rate", "30"], "--learning_rate 30: input should be less than or equal to 1"),
        (["--lora_dropout", "1.0"], "--lora_dropout 1.0"),
        (["--seed", "-1"], "--seed -1"),
        (["--num_epochs", "0"], "--num_epochs 0"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--load_8bit", "maybe"], "--load_8bit maybe: input should be a valid boolean"),
        (["--dtype", "int8"], "--dtype int8: input should be 'auto', 'bf16', 'fp16' or 'fp32'"),
        (["--device", "tpu"], "--device tpu"),
        (["--report_to", "paper"], "--report_to paper"),
        (["--val_set_size", "10.5"], "--val_set_size 10.5: a whole number of rows, or a share below 1"),
        (["--val_set_size", "-1"], "--val_set_size -1"),
        (["--lora_target_modules", ""], "--lora_target_modules"),
        (["--load_8bit", "--load_4bit"], "exclude each other"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--batch_size", "10", "--micro_batch_size", "4"], "nearest: 8 or 12"),
        (["--batch_size", "2", "--micro_batch_size", "4"], "nearest: 4"),
    ],
)
def test_finetune_refuses_in_one_line(words, said):
    assert said in refused("finetune", *words)


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("generate", ["--instruction", "x", "--chat"], "exclude each other"),
        ("generate", ["--input", "x"], "--instruction, which is missing"),
        ("generate", ["--temperature", "-1"], "--temperature -1"),
        ("generate", ["--top_p", "1.5"], "--top_p 1.5"),
        ("generate", ["--top_k", "-1"], "--top_k -1"),
        ("generate", ["--num_beams", "1000"], "--num_beams 1000"),
        ("generate", ["--max_new_tokens", "0"], "--max_new_tokens 0"),
        ("generate", ["--server_port", "70000"], "--server_port 70000"),
        ("generate", ["--lora_weight", "x"], "did you mean --lora_weights?"),
        ("export", ["--output", "x"], "did you mean --output_dir?"),
        ("exprot", [], "did you mean export?"),
    ],
)
def test_other_commands_refuse_in_one_line(verb, words, said):
    assert said in refused(verb, *words)


def test_values_arrive_as_they_were_typed():
    words = ["--data_path", "-x", "--wandb_run_name", "[1, 2]", "--base_model=1e3", "--output_dir", "a=b c"]
    config = parse(FinetuneConfig, words)
    assert (config.data_path, config.wandb_run_name, config.base_model) == ("-x", "[1, 2]", "1e3")
    assert config.output_dir == "a=b c"


@pytest.mark.parametrize("typed", ["[q_proj,k_proj]", "q_proj,k_proj", "['q_proj', 'k_proj']"])
def test_lists_are_read_in_every_way_people_type_them(typed):
    assert parse(FinetuneConfig, ["--lora_target_modules", typed]).lora_target_modules == ["q_proj", "k_proj"]


@pytest.mark.parametrize(
    ("typed", "meant"), [("True", True), ("false", False), ("no", False), ("0", False), ("1", True)]
)
def test_switches(typed, meant):
    assert parse(FinetuneConfig, ["--load_8bit", typed]).load_8bit is meant
    assert parse(FinetuneConfig, ["--train-on-inputs", typed]).train_on_inputs is meant  # dashes as well


def test_a_bare_switch_is_true():
    assert parse(FinetuneConfig, ["--resume", "--seed", "1"]).resume is True


@pytest.mark.parametrize("config_class", [FinetuneConfig, GenerateConfig, ExportConfig])
def test_help_has_every_option_with_a_default(config_class):
    text = " ".join(help_text(config_class).split())
    for name in config_class.model_fields:
        assert f" --{name} " in text
    assert text.count("default: ") == len(config_class.model_fields) + (" --config " in text)


def test_help_wins_over_everything_else():
    assert run("finetune", "--nonsense", "--help").code == 0


def test_overview_and_version():
    assert "finetune" in run("--help").out
    assert run("--version").out.strip().count(".") == 2


def test_the_package_is_the_command_too(tmp_path):
    words = [sys.executable, "-m", "lora_alpaca"]
    shown = subprocess.run([*words, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, run("--help").out, "")
    wrong = subprocess.run([*words, "show", "--rwo", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: unknown flag --rwo; did you mean --row?\n"


def test_the_page_without_gradio_is_one_line(monkeypatch):
    monkeypatch.setattr("lora_alpaca.inference.terminal.find_spec", lambda name: None)
    assert 'pip install "lora-alpaca[web]"' in refused("generate")


def test_a_wrong_flag_is_answered_before_torch_is_imported_and_nothing_is_written(tmp_path):
    code = (
        "import sys; from lora_alpaca.cli import main\n"
        "try: main(['finetune', '--learnig_rate', '1'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "world_size", "micro"),
    [
        ({}, 1, 4),
        ({}, 8, 4),
        ({"batch_size": 16}, 8, 2),
        ({"batch_size": 9}, 1, 3),
        ({"batch_size": 7}, 1, 1),
        ({"batch_size": 64, "micro_batch_size": 16}, 4, 16),
    ],
)
def test_the_batch_comes_out_exactly(options, world_size, micro):
    config = FinetuneConfig(**options)
    assert config.micro_batch(world_size) == micro
    assert config.batch_size % (micro * world_size) == 0


@pytest.mark.parametrize(
    ("options", "world_size", "said"),
    [
        ({"batch_size": 10}, 4, "no multiple of 4 devices; nearest: 8 or 12"),
        ({"batch_size": 128, "micro_batch_size": 32}, 8, "--micro_batch_size 32 x 8 devices; nearest: 256"),
    ],
)
def test_batch_arithmetic_never_changes_the_batch(options, world_size, said):
    """Upstream divides with // and trains on another batch size, or with 0 accumulation steps (pull request 266)."""
    with pytest.raises(ConfigError, match=said):
        FinetuneConfig(**options).micro_batch(world_size)


def test_world_size_is_known_before_the_run(monkeypatch):
    launched = {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert "3 devices" in refused("finetune", "--batch_size", "128")
