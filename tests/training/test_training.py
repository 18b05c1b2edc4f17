"""The main job on a tiny model: what it saves, what it says, how it resumes."""

import json
from pathlib import Path

import pytest
import torch
from command import error_line, refused, run
from short_run import flags, interrupt, same, tensors

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import AdapterError, CheckpointError, ConfigError, DataError, ModelError
from lora_alpaca.planning.plan import Plan
from lora_alpaca.storage import output_folder
from lora_alpaca.training.trackers import Tracker


@pytest.fixture
def options(tiny_llama, data_path, tmp_path):
    """Return the flags of a short run: 9 steps, a checkpoint every 3."""
    return {
        "base_model": str(tiny_llama),
        "data_path": str(data_path),
        "output_dir": str(tmp_path / "out"),
        "batch_size": 4,
        "max_steps": 9,
        "save_steps": 3,
        "eval_steps": 3,
        "val_set_size": 4,
        "learning_rate": 1e-2,
        "cutoff_len": 128,
        "dtype": "fp32",
        "load_8bit": False,
    }


def test_the_adapter_folder_remembers_everything(options, tmp_path):
    run_ = finetune(FinetuneConfig(**options))
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "lora_alpaca.json", "checkpoint-3", "checkpoint-6",
    }  # fmt: skip
    record = json.loads((folder / "lora_alpaca.json").read_text())
    assert record["status"] == "finished"
    assert record["base_model"] == Path(options["base_model"]).name
    assert record["template"]["prompt_input"].endswith("### Response:\n")
    assert record["options"]["learning_rate"] == 1e-2
    assert record["options"]["lora_r"] == 8
    assert set(record["versions"]) >= {"lora_alpaca", "torch", "transformers", "peft", "bitsandbytes"}
    assert record["result"]["validation_loss"] == run_.validation_loss
    assert run_.validation_loss < run_.first_validation_loss
    assert [entry["step"] for entry in run_.history if "validation_loss" in entry] == [3, 6, 9]


def test_the_adapter_is_not_empty(options, tmp_path):
    """Upstream saves a 443-byte adapter, and merging it changes nothing (issues 293, 319, 446 and others)."""
    finetune(FinetuneConfig(**options))
    state = tensors(tmp_path / "out")
    assert len(state) == 2 * 2 * 2  # layers x (q, v) x (A, B)
    assert all(tensor.abs().max() > 0 for tensor in state.values())


def test_the_same_config_gives_the_same_bits(options, tmp_path):
    for name in ("one", "two"):
        finetune(FinetuneConfig(**options | {"output_dir": str(tmp_path / name)}))
    assert same(tmp_path / "one", tmp_path / "two")
    finetune(FinetuneConfig(**options | {"output_dir": str(tmp_path / "three"), "seed": 7}))
    assert not same(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize("precision", [{}, {"load_8bit": True}, {"load_8bit": None, "load_4bit": True}])
def test_a_resumed_run_is_the_same_run(options, tmp_path, precision):
    options |= precision | {"lora_dropout": 0.1}
    whole = finetune(FinetuneConfig(**options))
    finetune(FinetuneConfig(**options | {"output_dir": str(tmp_path / "killed")}))
    interrupt(tmp_path / "killed", last_checkpoint=3)
    resumed = finetune(FinetuneConfig(**options | {"output_dir": str(tmp_path / "killed"), "resume": True}))
    assert same(tmp_path / "out", tmp_path / "killed")
    losses = [[entry.get("loss", entry.get("validation_loss")) for entry in run_.history] for run_ in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resume_takes_the_newest_that_is_whole_and_says_so(options, tmp_path, capsys):
    finetune(FinetuneConfig(**options))
    interrupt(tmp_path / "out", last_checkpoint=6)
    (tmp_path / "out" / "checkpoint-6" / "optimizer.safetensors").write_bytes(b"")
    finetune(FinetuneConfig(**options | {"resume": True}))
    said = capsys.readouterr().out
    assert "passed over" in said
    assert "optimizer.safetensors is missing or damaged" in said
    assert "resuming from" in said
    assert "checkpoint-3" in said


def test_resuming_with_other_options_is_refused(options, tmp_path):
    finetune(FinetuneConfig(**options))
    interrupt(tmp_path / "out", last_checkpoint=6)
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.01 and is 0\.001"):
        finetune(FinetuneConfig(**options | {"resume": True, "learning_rate": 1e-3}))


def test_a_named_checkpoint_is_used(options, tmp_path):
    finetune(FinetuneConfig(**options))
    named = str(tmp_path / "out" / "checkpoint-3")
    finetune(FinetuneConfig(**options | {"output_dir": str(tmp_path / "on"), "resume_from_checkpoint": named}))
    assert same(tmp_path / "out", tmp_path / "on")


def test_a_missing_checkpoint_is_an_error(options):
    """Upstream prints "not found" and trains from scratch."""
    assert "no such folder" in refused("finetune", *flags(options), "--resume_from_checkpoint", "nowhere")


def test_only_the_last_checkpoints_are_kept_and_nothing_else_is_removed(options, tmp_path):
    finetune(FinetuneConfig(**options | {"save_steps": 1, "save_total_limit": 2, "val_set_size": 0}))
    left = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert left == ["checkpoint-7", "checkpoint-8"]


def test_the_best_adapter_is_kept(options, tmp_path):
    """A rate that explodes makes the first steps the best ones."""
    run_ = finetune(
        FinetuneConfig(**options | {"learning_rate": 1.0, "max_steps": 12, "eval_steps": 1, "warmup_steps": 12})
    )
    losses = {entry["step"]: entry["validation_loss"] for entry in run_.history if "validation_loss" in entry}
    assert run_.best_step == min(losses, key=losses.get) < 12
    again = finetune(
        FinetuneConfig(
            **options
            | {
                "output_dir": str(tmp_path / "again"),
                "init_adapter": str(tmp_path / "out"),
                "max_steps": 1,
                "learning_rate": 1e-9,
            }
        )
    )
    assert again.first_validation_loss == pytest.approx(run_.validation_loss, rel=1e-6)


def test_early_stopping(options):
    options |= {
        "learning_rate": 1.0,
        "max_steps": 50,
        "eval_steps": 1,
        "early_stopping_patience": 2,
        "lr_scheduler": "constant",
    }
    run_ = finetune(FinetuneConfig(**options))
    assert run_.steps < 50
    assert run_.best_step == run_.steps - 2


def test_without_validation(options):
    run_ = finetune(FinetuneConfig(**options | {"val_set_size": 0}))
    assert run_.validation_loss is None
    assert run_.first_validation_loss is None


@pytest.mark.parametrize(
    "extra",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_target_modules": "all-linear"},
        {"lora_target_modules": ["k_proj", "o_proj"]},
        {"train_on_inputs": True, "group_by_length": True, "add_eos_token": False},
        {"gradient_checkpointing": "True"},
        {"lr_scheduler": "cosine", "warmup_steps": 0, "weight_decay": 0.1, "max_grad_norm": 0},
    ],
)
def test_every_option_trains(options, extra):
    run_ = finetune(FinetuneConfig(**options | {"max_steps": 4, "eval_steps": 4} | extra))
    assert run_.validation_loss < run_.first_validation_loss


def test_gradient_checkpointing_changes_no_weight(options, tmp_path):
    finetune(FinetuneConfig(**options))
    finetune(FinetuneConfig(**options | {"output_dir": str(tmp_path / "less"), "gradient_checkpointing": "true"}))
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "less")
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_an_unknown_target_module_lists_what_there_is(options):
    with pytest.raises(
        ModelError, match=r"--lora_target_modules qq_proj: the model has no such module; it has down_proj, gate_proj"
    ):
        finetune(FinetuneConfig(**options | {"lora_target_modules": ["q_proj", "qq_proj"]}))


def test_init_adapter_refuses_another_shape(options, tmp_path, tiny_model):
    finetune(FinetuneConfig(**options | {"max_steps": 1}))
    with pytest.raises(AdapterError):
        finetune(
            FinetuneConfig(
                **options
                | {
                    "output_dir": str(tmp_path / "o"),
                    "base_model": str(tiny_model("GPT2")),
                    "init_adapter": str(tmp_path / "out"),
                }
            )
        )


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"lora_r": 4}, "--lora_r 4: --init_adapter"),
        ({"lora_alpha": 1}, "has 16"),
        ({"use_dora": True}, "--use_dora True"),
        ({"lora_target_modules": ["q_proj"]}, "--init_adapter has q_proj,v_proj"),
    ],
)
def test_init_adapter_keeps_its_shape(options, tmp_path, extra, said):
    finetune(FinetuneConfig(**options | {"max_steps": 1}))
    start = {"output_dir": str(tmp_path / "on"), "init_adapter": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match=said):
        finetune(FinetuneConfig(**options | start | extra))
    assert not (tmp_path / "on").exists()


def test_init_adapter_that_is_missing(options):
    with pytest.raises(AdapterError, match="--init_adapter nowhere: no adapter there"):
        finetune(FinetuneConfig(**options | {"init_adapter": "nowhere"}))


def test_cutoff_beyond_the_model(options):
    assert "takes at most" in error_line(run("finetune", *flags(options | {"cutoff_len": 100_000})), 2)


def test_a_tracker_writes_through_no_link(tmp_path):
    pytest.importorskip("tensorboard")
    said = []
    (tmp_path / "theirs").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out").symlink_to(tmp_path / "theirs")
    config = FinetuneConfig(report_to="tensorboard", output_dir=str(tmp_path / "out"))
    Tracker(config, True, said.append).start(None)
    where = tmp_path / "out" / "out"
    assert said == [f"warning: --report_to tensorboard: {where} is a symbolic link; going on without it"]
    assert list((tmp_path / "theirs").iterdir()) == []


def test_tensorboard(options, tmp_path):
    pytest.importorskip("tensorboard")
    finetune(FinetuneConfig(**options | {"report_to": "tensorboard"}))
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_there_is_a_warning(options, tracker, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    extra = {"wandb_project": "p"} if tracker == "wandb" else {"report_to": tracker}
    assert finetune(FinetuneConfig(**options | extra | {"max_steps": 1})).steps == 1
    assert f"warning: --report_to {tracker}: not installed" in capsys.readouterr().out


def test_the_learning_rate_rises_and_falls():
    config = FinetuneConfig(learning_rate=1.0)
    plan = Plan(total_steps=10, warmup_steps=2, eval_steps=1, save_steps=1, micro_batch_size=1)
    rates = [plan.learning_rate(step, config) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(1 / 8)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert {
        plan.learning_rate(step, config.model_copy(update={"lr_scheduler": "constant"})) for step in range(2, 10)
    } == {1.0}


def test_processes_that_read_different_rows_are_stopped(options, monkeypatch):
    """A file that is written while the processes of a run start one after the other."""
    monkeypatch.setattr(World, "gather", lambda self, facts: [facts, dict.fromkeys(facts, "others")])
    with pytest.raises(DataError, match="the processes read different rows"):
        finetune(FinetuneConfig(**options))


def test_a_gate_stops_before_the_model_is_loaded(options, no_model_loads):
    with pytest.raises(DataError, match=r"--max_truncated 0\.01: \d+ of 48 rows"):
        finetune(FinetuneConfig(**options | {"cutoff_len": 50, "max_truncated": 0.01}))


def test_the_ledger_is_kept_with_the_run(options, tmp_path):
    finetune(FinetuneConfig(**options | {"max_steps": 1}))
    ledger = output_folder.read_record(tmp_path / "out")["ledger"]
    assert (ledger["read"], ledger["formats"]) == (48, {"Alpaca": 48})
    assert ledger["train"] + ledger["validation"] == 48
