"""The adapter with the best validation loss: a checkpoint that rotation spares, found again by a run that resumes."""

import shutil

import pytest
from short_run import interrupt, same

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.storage import output_folder


@pytest.fixture
def options(tiny_llama, data_path, tmp_path):
    """Return the flags of a run whose rate explodes, so that an early adapter is the best one."""
    return {
        "base_model": str(tiny_llama), "data_path": str(data_path), "output_dir": str(tmp_path / "out"),
        "batch_size": 4, "max_steps": 9, "save_steps": 1, "save_total_limit": 1, "eval_steps": 1, "val_set_size": 4,
        "learning_rate": 0.2, "warmup_steps": 9, "cutoff_len": 128, "dtype": "fp32", "load_8bit": False,
    }  # fmt: skip


def steps(folder):
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


@pytest.fixture
def whole(options, tmp_path):
    """Return the folder of a run that was never stopped, and the step of its best adapter."""
    result = finetune(FinetuneConfig(**options))
    assert 0 < result.best_step < 7
    return tmp_path / "out", result.best_step


def killed(whole, folder):
    """Return a copy of a finished run as a kill after its last checkpoint leaves it."""
    shutil.copytree(whole, folder)
    interrupt(folder, last_checkpoint=9)
    return folder


def test_the_best_one_is_spared_and_is_what_is_saved(whole):
    folder, best = whole
    assert steps(folder) == [best, 8]
    assert same(folder, folder / f"checkpoint-{best}")
    assert not (folder / "checkpoint-8" / "best.safetensors").exists()


def test_a_run_that_resumes_finds_it(whole, options, tmp_path):
    folder = killed(whole[0], tmp_path / "killed")
    result = finetune(FinetuneConfig(**options | {"output_dir": str(folder), "resume": True}))
    assert result.best_step == whole[1]
    assert same(folder, whole[0])


def test_a_run_that_resumes_into_another_folder_takes_it_along(whole, options, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    changes = {"output_dir": str(elsewhere), "resume_from_checkpoint": str(whole[0] / "checkpoint-8")}
    finetune(FinetuneConfig(**options | changes))
    assert same(elsewhere, whole[0])


def test_a_run_that_resumes_from_a_finished_one_takes_it_along(whole, options, tmp_path):
    """The finished run is set aside, and its checkpoints with it."""
    finished = tmp_path / "finished"
    shutil.copytree(whole[0], finished)
    changes = {"output_dir": str(finished), "resume_from_checkpoint": str(finished / "checkpoint-8")}
    result = finetune(FinetuneConfig(**options | changes))
    assert result.best_step == whole[1]
    assert same(finished, whole[0])
    assert same(tmp_path / "finished.1", whole[0])


def test_where_it_is_lost_that_is_said_and_another_one_is_found(whole, options, tmp_path, capsys):
    folder = killed(whole[0], tmp_path / "killed")
    shutil.rmtree(folder / f"checkpoint-{whole[1]}")
    capsys.readouterr()
    result = finetune(FinetuneConfig(**options | {"output_dir": str(folder), "resume": True}))
    assert f"checkpoint-{whole[1]} has the best weights so far, and " in capsys.readouterr().out
    assert result.best_step == 9
    assert output_folder.read_record(folder)["status"] == "finished"


def test_a_checkpoint_of_the_version_before_holds_it_itself(whole, options, tmp_path):
    folder = killed(whole[0], tmp_path / "killed")
    best = folder / f"checkpoint-{whole[1]}"
    with_best_inside(folder / "checkpoint-8", best / "adapter_model.safetensors")
    shutil.rmtree(best)
    finetune(FinetuneConfig(**options | {"output_dir": str(folder), "resume": True}))
    assert same(folder, whole[0])


def with_best_inside(checkpoint, weights):
    """Put the best adapter into a checkpoint, as the first version of the library did."""
    import hashlib
    import json

    data = weights.read_bytes()
    (checkpoint / "best.safetensors").write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["best.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
