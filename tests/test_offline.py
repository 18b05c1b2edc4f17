"""The three scripts, as in a fresh clone, with every outbound connection blocked."""

import socket

import pytest
from safetensors.torch import load_file


def test_a_deliberate_connection_fails():
    with pytest.raises(OSError, match="tests run offline"):
        socket.create_connection(("93.184.216.34", 80), timeout=2)


def test_a_script_cannot_connect_either(run_script, tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text("import socket; socket.create_connection(('93.184.216.34', 80), timeout=2)")
    assert run_script(probe, cwd=tmp_path).returncode != 0


@pytest.mark.slow
def test_the_main_job_with_nothing_said_twice(run_script, tmp_path):
    short = ("--max_steps", 2, "--val_set_size", 4)
    for time in (1, 2):
        trained = run_script("finetune.py", *short, cwd=tmp_path, check=True)
        exported = run_script("export_hf_checkpoint.py", cwd=tmp_path, check=True)
        answered = run_script(
            "generate.py", "--load_8bit", "--instruction", "Tell me about alpacas.", cwd=tmp_path, check=True
        )
        assert answered.stdout.strip()
        assert "adapter lora-alpaca on demo" in answered.stderr
        assert "merge checked" in exported.stdout
        assert ("they are now in" in trained.stdout) == (time == 2)
    assert load_file(tmp_path / "lora-alpaca" / "adapter_model.safetensors")
    assert (tmp_path / "lora-alpaca.1").is_dir()
    assert (tmp_path / "hf_ckpt.1").is_dir()


@pytest.mark.slow
def test_two_ranks_from_the_command_line(tmp_path, run_script, tiny_llama, data_path):
    """`torchrun --nproc_per_node=2 finetune.py` makes the same steps as `python finetune.py`; one rank speaks."""
    import os
    import subprocess

    from conftest import ROOT, TORCHRUN

    words = [
        "--base_model",
        tiny_llama,
        "--data_path",
        data_path,
        "--batch_size",
        8,
        "--max_steps",
        4,
        "--val_set_size",
        4,
    ]
    words += [
        "--dtype",
        "fp32",
        "--load_8bit",
        "False",
        "--lora_dropout",
        0,
        "--learning_rate",
        "1e-2",
        "--cutoff_len",
        96,
    ]
    run_script("finetune.py", *words, "--output_dir", "one", cwd=tmp_path, check=True)
    launcher = [*TORCHRUN, str(ROOT / "finetune.py")]
    done = subprocess.run(
        [*launcher, *map(str, words), "--output_dir", "two"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter saved in two") == 1
    assert "destroy_process_group" not in done.stderr
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in one:
        assert (one[name] - two[name]).norm() / one[name].norm() < 1e-3
