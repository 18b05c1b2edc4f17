"""A base that is sharded over ranks gives the losses, gradients and weights of one that a single process holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, TORCHRUN

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import ConfigError

EXACT = 1e-5
FAMILIES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "OPT", "GPT2"]
SGD, ADAMW = {"optimizer": "sgd", "rate": 0.1}, {"optimizer": "adamw", "rate": 1e-3}


def run(folder, cases, processes=2):
    """Return what the ranks found of some cases, one launch for all of them."""
    sizes = {case["family"]: ARCHITECTURES[case["family"]] for case in cases}
    launch = [*TORCHRUN[:-1], f"--nproc_per_node={processes}", str(Path(__file__).with_name("fsdp_ranks.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launch, str(folder), json.dumps(cases), json.dumps(sizes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-9000:]
    return list(zip(cases, json.loads((folder / "found.json").read_text()), strict=True))


def require_exact(case, found):
    assert found["before"] == 0, (case, found)  # the first weights, from the same random numbers
    for name in ("loss", "norm", "gradient", "clipped"):
        assert found[name] < EXACT, (case, found)
    if case.get("optimizer"):
        assert found["moved"] > 0, (case, found)
        assert found["near"] > 0.999, (case, found)
    if case.get("optimizer") == "sgd":
        assert found["after"] < EXACT, (case, found)
    assert found["is_plain"] or case.get("tune") == "full", (case, found)  # what a checkpoint is given


@pytest.mark.slow
def test_adapters_on_sharded_bases_learn_as_on_whole_ones(tmp_path):
    """Every family in 16, 8 and 4 bits, packed and padded by turns; ten steps of each optimizer."""
    engines = ["packed", "padded"] * len(FAMILIES)
    cases = [
        {"family": family, "bits": bits, "engine": engines[number + place]}
        for number, family in enumerate(FAMILIES)
        for place, bits in enumerate((16, 8, 4))
    ]
    cases[0] |= SGD
    cases[1] |= ADAMW
    cases[2] |= SGD
    cases[12] |= ADAMW  # Gemma, whose embedding and head are one
    for case, found in run(tmp_path, cases):
        require_exact(case, found)


@pytest.mark.slow
def test_sharded_weights_learn_as_whole_ones(tmp_path):
    """Full finetuning of every family, and of last layers alone."""
    cases = [
        {"family": family, "tune": "full", "engine": ("packed", "padded")[number % 2]}
        for number, family in enumerate(FAMILIES)
    ]
    cases[0] |= SGD
    cases[4] |= ADAMW
    cases += [
        {"family": "Llama", "tune": "full", "engine": "padded"} | ADAMW,
        {"family": "OPT", "tune": "full", "layers": "top:1", "engine": "packed"} | SGD,
        {"family": "Qwen3", "tune": "full", "engine": "packed", "shard": "grads", "checked": True},
    ]
    for case, found in run(tmp_path, cases):
        require_exact(case, found)


@pytest.mark.slow
def test_the_ways_to_shard_are_one_another(tmp_path):
    """Also bit by bit what two ranks that hold whole weights compute, since that is the same arithmetic."""
    same = {"against": "ranks", "family": "Llama", "engine": "packed"}
    lora = [
        same | ADAMW | {"bits": 16, "shard": "grads"},
        same | ADAMW | {"bits": 8, "offload": True},
        same | ADAMW | {"bits": 4, "recomputes": True},
        same | {"bits": 16, "dtype": "bfloat16", "checked": True},
        same | {"bits": 8, "dtype": "bfloat16", "checked": True},
        same | {"bits": 4, "dtype": "bfloat16", "checked": True},
    ]
    full = [{"family": "Gemma", "tune": "full", "engine": "packed", "offload": True, "recomputes": True} | SGD]
    faults = [
        {"family": "Llama", "bits": 8, "fault": True},
        {"family": "Llama", "bits": 16, "dtype": "bfloat16", "fault": True},
        {"family": "Llama", "tune": "full", "dtype": "bfloat16", "fault": True},
    ]
    found = run(tmp_path, lora + full + faults)
    for case, result in found[: len(lora)]:
        assert all(result[name] == 0 for name in ("loss", "gradient", "before", "after")), (case, result)
        assert len(result["notes"]) == 1, result  # nothing against packs, and a slice in fp32 was compared
    for case, result in found[len(lora) : -len(faults)]:
        require_exact(case, result)
    for case, result in found[-len(faults) :]:
        assert "this model cannot take packs: the gradient of a row in a pack is" in result["notes"][0], (case, result)


@pytest.mark.slow
def test_four_ranks_hold_two_copies(tmp_path):
    cases = [
        {"family": "Llama", "bits": 8, "engine": "packed", "shard_size": 2} | SGD,
        {"family": "OPT", "tune": "full", "engine": "padded", "shard_size": 2} | SGD,
    ]
    for case, found in run(tmp_path, cases, processes=4):
        require_exact(case, found)


def test_what_sharding_cannot_do_is_said(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "4",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--shard_size 3: the 4 devices are no multiple of it"):
        FinetuneConfig(shard="full", shard_size=3)
    with pytest.raises(ConfigError, match="--use_dora reads whole weights, which --shard grads spreads"):
        FinetuneConfig(shard="grads", use_dora=True)
    with pytest.raises(
        ConfigError, match="--on_oom shrink: with --shard full a rank that is short of memory is missed"
    ):
        FinetuneConfig(shard="full", on_oom="shrink")
