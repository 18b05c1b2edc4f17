"""Every row of the table of defaults: what is said on the command line, and what happens."""

import json
import shutil

import pytest
import torch
from command import refused, run

from lora_alpaca import data
from lora_alpaca.config import FinetuneConfig, GenerateConfig
from lora_alpaca.models.base import Path, demo_base
from lora_alpaca.models.device import choose_device
from lora_alpaca.planning.plan import resolve_steps
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.output_folder import OutputFolder

SHORT = ["--max_steps", "1", "--batch_size", "2", "--val_set_size", "2", "--cutoff_len", "96"]
ASK = ["--instruction", "Hello.", "--max_new_tokens", "2", "--temperature", "0"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BASE_MODEL", raising=False)


@pytest.fixture
def train(tiny_llama, data_path):
    """Return a function that trains for a step on the tiny model: train(flag, value, ...) -> Result."""

    def train_(*words):
        base = [] if "--base_model" in words else ["--base_model", tiny_llama]
        return run("finetune", *base, "--data_path", data_path, *SHORT, *words)

    return train_


# ------------------------------------------------------------------------------------------------------ precision

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    ("said", "native_bf16", "device", "bits", "dtype"),
    [
        ({}, True, CPU, 8, torch.bfloat16),
        ({}, False, CPU, 8, torch.float32),
        ({}, True, CUDA, 8, torch.bfloat16),
        ({}, False, CUDA, 8, torch.float16),  # a V100
        ({}, False, MPS, 16, torch.float32),
        ({"load_4bit": True}, True, CUDA, 4, torch.bfloat16),
        ({"load_8bit": False}, True, CUDA, 16, torch.bfloat16),
        ({"load_8bit": False, "load_4bit": False}, True, CUDA, 16, torch.bfloat16),
        ({"dtype": "fp32"}, True, CUDA, 8, torch.float32),
        ({"dtype": "fp16"}, True, CUDA, 8, torch.float16),
        ({"dtype": "bf16"}, False, CUDA, 8, torch.float16),
        ({"dtype": "bf16"}, False, CPU, 8, torch.float32),
    ],
)
def test_training_precision(monkeypatch, said, native_bf16, device, bits, dtype):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": native_bf16})
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: native_bf16)
    spec, sentences = choose_device(FinetuneConfig(**said), device, default_bits=8)
    assert (spec.bits, spec.dtype) == (bits, dtype)
    replaced = said.get("dtype") == "bf16" and not native_bf16
    assert len(sentences) == int(replaced) + int(device == MPS) + int(device == CPU)  # a CPU is slow in 8 bits


def test_both_quantisations_are_refused():
    assert "exclude each other" in refused("finetune", "--load_8bit", "--load_4bit")


def test_generation_is_unquantised_unless_said():
    assert choose_device(GenerateConfig(device="cpu"))[0].bits == 16
    assert choose_device(GenerateConfig(device="cpu", load_8bit=True))[0].bits == 8
    assert choose_device(GenerateConfig(device="cpu", load_4bit=True))[0].bits == 4


def test_a_device_that_is_not_there():
    if not torch.cuda.is_available():
        assert "torch sees no such device here; it sees" in run("finetune", "--device", "cuda").err


# --------------------------------------------------------------------------------------------- finetune: what and where


def test_finetune_with_nothing_named_trains_the_demo():
    result = run("finetune", "--max_steps", "1")
    assert result.code == 0, result.err
    record = output_folder.read_record(Path("lora-alpaca"))
    assert (record["base_model"], record["options"]["data_path"]) == ("demo", "demo")
    recipe = json.loads((demo_base().parent / "recipe.json").read_text())
    assert record["options"]["learning_rate"] == recipe["learning_rate"]
    assert record["precision"].startswith("8-bit")


def test_the_recipe_yields_to_what_is_said_and_stays_with_the_demo(train):
    run("finetune", *SHORT, "--learning_rate", "1e-4", "--output_dir", "a")
    assert output_folder.read_record(Path("a"))["options"]["learning_rate"] == 1e-4
    train("--output_dir", "b")
    assert output_folder.read_record(Path("b"))["options"]["learning_rate"] == 3e-4


def test_base_model_only_asks_for_upstreams_data_and_offline_says_what_to_pass(tiny_llama):
    result = run("finetune", "--base_model", tiny_llama)
    assert result.code == 2
    assert "--data_path yahma/alpaca-cleaned" in result.err
    assert "pass a .json file" in result.err


def test_data_path_only_trains_the_demo_base_and_says_so(data_path):
    result = run("finetune", "--data_path", data_path, *SHORT)
    assert "no --base_model given: using the tiny demo model" in result.out


def test_three_rows_are_enough(tmp_path):
    rows = [{"instruction": f"Greet the {animal}.", "output": f"Hello, {animal}!"} for animal in ("owl", "bee", "fox")]
    (tmp_path / "three.json").write_text(json.dumps(rows))
    result = run("finetune", "--data_path", "three.json", "--max_steps", "2")
    assert result.code == 0, result.err
    assert "3 to train on, 0 to validate on" in result.out
    assert "warning: 3 rows are fewer than --batch_size 16" in result.out


def test_a_finished_run_in_the_way_is_set_aside(train):
    assert train().code == 0
    assert "they are now in" in train().out
    assert {OutputFolder(Path(name)).status for name in ("lora-alpaca", "lora-alpaca.1")} == {"finished"}


def test_an_unfinished_run_in_the_way_is_refused_with_the_two_ways_on(train):
    unfinished("lora-alpaca")
    result = train()
    assert result.code == 2
    assert "--resume" in result.err
    assert "--overwrite" in result.err


def test_a_foreign_folder_is_refused_even_with_overwrite(train):
    Path("lora-alpaca").mkdir()
    Path("lora-alpaca/thesis.tex").write_text("x")
    for words in ([], ["--overwrite"], ["--resume"]):
        result = train(*words)
        assert result.code == 2
        assert "was not made by lora_alpaca" in result.err
    assert Path("lora-alpaca/thesis.tex").read_text() == "x"


def test_overwrite_removes_only_what_is_ours(train):
    train()
    Path("lora-alpaca/notes.txt").write_text("mine")
    Path("lora-alpaca/checkpoint-best").mkdir()
    Path("lora-alpaca/checkpoint-best/x").write_text("mine too")
    for name, step in (("site", '"step": 1, '), ("checkpoint-9", "")):  # manifests of somebody else's
        Path(f"lora-alpaca/{name}").mkdir()
        Path(f"lora-alpaca/{name}/index.html").write_text("mine as well")
        Path(f"lora-alpaca/{name}/manifest.json").write_text(f'{{{step}"files": ["index.html"]}}')
    assert train("--overwrite").code == 0
    assert Path("lora-alpaca/notes.txt").read_text() == "mine"
    assert Path("lora-alpaca/checkpoint-best/x").read_text() == "mine too"
    assert Path("lora-alpaca/site/index.html").read_text() == "mine as well"
    assert Path("lora-alpaca/checkpoint-9/index.html").read_text() == "mine as well"
    assert not Path("lora-alpaca.1").exists()


def test_an_output_dir_that_is_a_file(train):
    Path("lora-alpaca").write_text("x")
    assert "is not a folder" in train().err


# ------------------------------------------------------------------------------------------------------- resuming


def unfinished(folder):
    Path(folder).mkdir()
    atomic.replace(Path(folder) / output_folder.RECORD, atomic.as_json({"status": "running", "kind": "adapter"}))


def test_resume_without_a_checkpoint_starts_fresh(train):
    result = train("--resume")
    assert result.code == 0
    assert "no checkpoint yet; starting fresh" in result.out
    shutil.rmtree("lora-alpaca")
    unfinished("lora-alpaca")
    assert train("--resume").code == 0
    assert not Path("lora-alpaca.1").exists()


def test_resume_with_nothing_but_damaged_checkpoints(train):
    unfinished("lora-alpaca")
    broken = Path("lora-alpaca/checkpoint-3")
    broken.mkdir()
    (broken / "manifest.json").write_text('{"run": "1", "files": {"state.json": {"bytes": 1, "sha256": "0"}}}')
    result = train("--resume")
    assert result.code == 1
    assert "no checkpoint in lora-alpaca is whole" in result.err


def test_resume_of_a_finished_run(train):
    train()
    result = train("--resume")
    assert result.code == 0
    assert "already finished" in result.out


def test_resume_with_overwrite_is_refused():
    assert "exclude each other" in refused("finetune", "--resume", "--overwrite")


def test_resume_from_an_adapter_names_init_adapter(train):
    train()
    result = train("--resume_from_checkpoint", "lora-alpaca", "--output_dir", "b")
    assert result.code == 2
    assert "--init_adapter lora-alpaca" in result.err


def test_resume_from_a_missing_checkpoint(train):
    result = train("--resume_from_checkpoint", "nowhere")
    assert result.code == 2
    assert "no such folder" in result.err


# -------------------------------------------------------------------------------------------- generate and export


def test_generate_with_nothing_there_runs_the_demo_base():
    result = run("generate", *ASK)
    assert result.code == 0
    assert "no adapter in ./lora-alpaca yet: answering with the untrained demo base" in result.err


def test_export_with_nothing_there_is_an_error():
    result = run("export")
    assert result.code == 1
    assert "no adapter there; train one first" in result.err


def test_generate_and_export_find_what_was_made(train, tiny_llama):
    train()
    result = run("generate", *ASK)
    assert result.code == 0
    assert f"adapter lora-alpaca on {tiny_llama}" in result.err
    assert run("export").code == 0
    result = run("generate", "--base_model", "./hf_ckpt", *ASK)
    assert result.code == 0
    assert "merged by lora_alpaca" in result.err
    second = run("export")
    assert "they are now in" in second.out


def test_generate_with_a_base_takes_the_adapter_only_if_it_was_made_for_it(train, tiny_llama, tiny_model):
    train()
    assert "adapter lora-alpaca on" in run("generate", "--base_model", tiny_llama, *ASK).err
    other = run("generate", "--base_model", tiny_model("GPT2"), "--prompt_template", "alpaca", *ASK)
    assert other.code == 0
    assert "was made for" in other.err
    assert "alone" in other.err


def test_base_model_from_the_environment(train, tiny_llama, monkeypatch):
    monkeypatch.setenv("BASE_MODEL", str(tiny_llama))
    result = run("generate", "--prompt_template", "alpaca", *ASK)
    assert f"model {tiny_llama}, without an adapter" in result.err


def test_without_a_recorded_template_it_must_be_named(train, tiny_llama, monkeypatch):
    train()
    monkeypatch.setenv("BASE_MODEL", str(tiny_llama))
    for name in ("lora_alpaca.json", "prompt_contract.json"):  # what plain PEFT would have left
        Path("lora-alpaca", name).unlink()
    for verb in ("generate", "export"):
        result = run(verb, *(ASK if verb == "generate" else []))
        assert result.code == 2
        assert "--prompt_template" in result.err
    result = run("generate", "--prompt_template", "alpaca", *ASK)
    assert result.code == 0
    assert "warning: nothing records which prompt template" in result.err
    result = run("export", "--prompt_template", "alpaca")
    assert "warning: nothing records which prompt template" in result.out


def test_another_template_than_the_recorded_one_is_refused(train):
    train()
    for verb in ("generate", "export"):
        result = run(verb, "--prompt_template", "vigogne", *(ASK if verb == "generate" else []))
        assert result.code == 2
        assert "was trained with alpaca" in result.err
    assert run("generate", "--prompt_template", "alpaca", *ASK).code == 0


def test_no_end_token_is_warned_about(train):
    assert "will not stop" in train("--add_eos_token", "False").out
    assert "will not stop" not in train().out


def test_val_set_size_is_at_most_a_tenth():
    assert len(data.held_out(990, None, 42)) == 99


def test_the_optimizer():
    config = FinetuneConfig()
    assert (config.lr_scheduler, config.max_grad_norm, config.weight_decay) == ("linear", 1.0, 0.0)
    assert (config.save_total_limit, config.batch_size, config.learning_rate) == (3, 128, 3e-4)
    plan = resolve_steps(config, rows=999, world_size=1)
    assert (plan.total_steps, plan.warmup_steps, plan.eval_steps, plan.save_steps) == (24, 3, 6, 200)
    assert resolve_steps(config, rows=52_000, world_size=1).warmup_steps == 100


def test_what_is_optimised_and_how(train, monkeypatch):
    made = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: made.append(adamw(*args, **options)) or made[-1])
    train()
    assert made[0].defaults["weight_decay"] == 0
    assert len(made[0].param_groups[0]["params"]) == 8  # A and B of q and v in two layers, and nothing else


# --------------------------------------------------------------------------------------------------------- the hub


@pytest.mark.slow
def test_a_base_from_the_hub_is_pinned_to_its_commit(tiny_llama, data_path, tmp_path, run_script):
    """Offline, from a cache as huggingface_hub leaves it: the commit is recorded, and used when generating."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(tiny_llama, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    hub = {"HF_HUB_CACHE": str(tmp_path / "cache")}
    words = ["--base_model", "someone/tiny", "--data_path", data_path, *SHORT, "--load_8bit", "False"]
    run_script("finetune.py", *words, cwd=tmp_path, check=True, **hub)
    record = output_folder.read_record(tmp_path / "lora-alpaca")
    assert (record["base_model"], record["base_revision"]) == ("someone/tiny", commit)
    (cached / "refs" / "main").write_text("f" * 40)  # the branch has moved on; the recorded commit has not
    answered = run_script("generate.py", *ASK, cwd=tmp_path, check=True, **hub)
    assert "adapter lora-alpaca on someone/tiny" in answered.stderr


def test_a_base_that_is_nowhere():
    result = run("finetune", "--base_model", "someone/nothing", "--data_path", "demo", "--max_steps", "1")
    assert result.code == 1
    assert result.err.startswith("error: --base_model someone/nothing:")
    assert len(result.err.strip().splitlines()) == 1


def test_an_adapter_is_no_base(train):
    train()
    shutil.copytree("lora-alpaca", "copy")
    assert "an adapter, not a base model" in run("finetune", "--base_model", "./copy", "--data_path", "demo").err
