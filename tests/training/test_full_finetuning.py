"""Full finetuning: ten steps against a plain loop of torch, the folder that a run leaves, and who reads it."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from command import run
from engines import fit, make_whole, rows, settings

from lora_alpaca.artifacts import model_folder
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import IGNORED
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.models import full
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.full import FullWeights
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.planning.recipes import fill_defaults
from lora_alpaca.prompts import load_template
from lora_alpaca.training.step import Stepper

FP32 = {"tune": "full", "dtype": "fp32", "device": "cpu"}
RATE, STEPS = 1e-3, 10


def plain_loop(model, batches, dtype):
    """Return what a plain loop of torch makes of the weights that learn, each row alone, as one vector."""
    model = copy.deepcopy(model).to(dtype)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        labels = sum(example.num_labels() for example in batch)
        for example in batch:
            logits = model(input_ids=torch.tensor(example.ids.tolist())[None], use_cache=False).logits[0, :-1]
            wanted = torch.tensor(example.labels[1:])
            (F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum") / labels).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
    return torch.cat([parameter.detach().double().flatten() for parameter in learning])


@pytest.mark.parametrize("engine", ["packed", "padded"])
@pytest.mark.parametrize("layers", ["all", "top:1"])
def test_ten_steps_move_the_weights_as_a_plain_loop_does(layers, engine):
    options = FP32 | {"layers": layers}
    model = make_whole("Llama", {"layers": layers})
    before = torch.cat([one.detach().double().flatten() for one in model.parameters() if one.requires_grad])
    batches = [rows(6, seed=seed) for seed in range(STEPS)]
    judge, plain = (plain_loop(model, batches, dtype) for dtype in (torch.float64, torch.float32))
    frozen = [one.clone() for one in model.parameters() if not one.requires_grad]
    with World(FinetuneConfig(**options)) as world, fit(model, settings(engine=engine, checked=True), []) as (way, _):
        stepper = Stepper(way, FullWeights(model), Replicated(world), world, FinetuneConfig(**options), print)
        for batch in batches:
            stepper.step(batch, RATE)
    found = torch.cat([parameter.detach().double().flatten() for parameter in stepper.parameters])
    moved = (judge - before).norm()
    assert (found - judge).norm() / moved < max(1e-3, 3 * ((plain - judge).norm() / moved).item())
    assert all(map(torch.equal, frozen, (one for one in model.parameters() if not one.requires_grad)))


@pytest.mark.parametrize("layers", ["all", "top:1"])
@pytest.mark.parametrize("architecture", ["Llama", "OPT", "GPT2"])
def test_a_saved_model_has_the_logits_of_the_one_in_memory(tiny_model, tmp_path, architecture, layers):
    base = locate_base(str(tiny_model(architecture)))
    model, _ = load_base(base, DeviceSpec(torch.device("cpu"), torch.float32, 16))
    trained = FullWeights(full.mark_learning(model, FinetuneConfig(tune="full", layers=layers), torch.float32))
    with torch.no_grad():
        for parameter in trained.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    tokenizer, _ = load_tokenizer(base)
    template, record = load_template("alpaca").bound(tokenizer), {"base_model": base.name, "run": "one"}
    contents = model_folder.TrainedModel(trained.names, base, tokenizer, template, [2], {}, record)
    model_folder.save(
        tmp_path, contents, iter(trained.state().items()), RunResult(tmp_path, 1, None, None, None, 0, [])
    )
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.items() >= json.loads((tiny_model(architecture) / "config.json").read_text()).items()
    described = json.loads((tmp_path / "lora_alpaca.json").read_text())
    assert (described["kind"], described["status"], list(described["weights"])) == (
        "model",
        "finished",
        ["model.safetensors"],
    )


@pytest.fixture
def finetuned(tiny_llama, data_path, tmp_path, monkeypatch):
    """Return the folder of a model after two steps, ./lora-alpaca in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BASE_MODEL", raising=False)
    said = run(
        "finetune", "--tune", "full", "--base_model", tiny_llama, "--data_path", data_path, "--max_steps", "2",
        "--batch_size", "2", "--val_set_size", "2", "--cutoff_len", "96", "--dtype", "fp32",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert "recipe of full finetuning: learning_rate 2e-05, lr_scheduler cosine, warmup_ratio 0.03" in said.out
    assert "unquantised base, fp32 compute" in said.out
    return tmp_path / "lora-alpaca"


def test_a_finetuned_model_is_found_answers_and_is_exported(finetuned, tmp_path):
    asked = ("--instruction", "Hello.", "--max_new_tokens", "2", "--temperature", "0")
    unnamed, named = run("generate", *asked), run("generate", "--base_model", finetuned, *asked)
    assert unnamed.code == named.code == 0, unnamed.err + named.err
    assert unnamed.out == named.out
    assert "lora-alpaca, finetuned by lora_alpaca" in unnamed.err
    assert run("export", "--output_dir", "out").code == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (finetuned / "model.safetensors").read_bytes()
    assert "finetuned whole, and has no adapter" in run("export", "--format", "adapter", "--output_dir", "other").err
    assert "nothing is merged into another" in run("export", "--base_model", "demo", "--output_dir", "other").err


def test_a_finetuned_model_that_was_changed_is_refused(finetuned, tmp_path):
    shutil.copytree(finetuned, tmp_path / "copy")
    with open(tmp_path / "copy/model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "is not as it was exported" in run("generate", "--base_model", tmp_path / "copy", "--instruction", "Hi").err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tune", "full", "--lora_r", "4", "--use_dora"], "--lora_r, --use_dora of an adapter; leave one out"),
        (["--tune", "full", "--init_adapter", "x"], "--init_adapter of an adapter"),
        (["--tune", "full", "--load_8bit"], "--load_8bit True: what is quantised cannot learn"),
        (["--tune", "full", "--load_4bit"], "--load_4bit True: what is quantised cannot learn"),
        (["--tune", "full", "--layers", "top:9"], "--layers top:9: demo has 5 layers"),
        (["--layers", "top:6"], "--layers top:6: demo has 5 layers"),
        (["--layers", "top:1", "--init_adapter", "x"], "--init_adapter has its own layers"),
    ],
)
def test_what_full_finetuning_cannot_be_asked(words, said, tmp_path):
    result = run("finetune", "--base_model", "demo", "--output_dir", tmp_path / "out", *words)
    assert result.code == 2
    assert said in result.err


def test_the_recipe_of_full_finetuning_gives_way_to_what_is_said():
    config, _ = fill_defaults(FinetuneConfig(tune="full", base_model="x", data_path="y", warmup_steps=7), 1)
    assert (config.learning_rate, config.lr_scheduler, config.warmup_ratio) == (2e-5, "cosine", None)
    config, _ = fill_defaults(FinetuneConfig(tune="full", base_model="x", data_path="y", learning_rate=1e-4), 1)
    assert (config.learning_rate, config.warmup_ratio) == (1e-4, 0.03)
    config, notes = fill_defaults(FinetuneConfig(tune="lora", base_model="x", data_path="y"), 1)
    assert (config.learning_rate, config.lr_scheduler, notes) == (3e-4, "linear", [])
