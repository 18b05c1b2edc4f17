"""The plan of a run and its estimates: from counted tokens and a model without weights, the same on every rank."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.planning import estimate
from lora_alpaca.planning.estimate import ModelSize, free_bytes
from lora_alpaca.planning.plan import choose_engine, estimate_run, resolve, resolve_steps, updated
from lora_alpaca.planning.preflight import check_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SEVEN_B = ModelSize(layers=32, width=4096, vocabulary=32_000, parameters=7_000_000_000, trainable=4_000_000, weights=0)
LENGTHS = np.array([100] * 64 + [500] * 64)


def plan(size=SEVEN_B, device=CUDA, free=40 * 10**9, lengths=LENGTHS, world_size=1, **options):
    config = FinetuneConfig(**options)
    return choose_engine(
        resolve_steps(config, len(lengths), world_size), config, lengths, size, device, free, world_size
    )


def test_packs_on_a_gpu_are_as_large_as_half_of_its_memory():
    assert plan(free=40 * 10**9).token_budget == 20 * 10**9 // (34 * 32 * 4096)
    assert plan(free=4 * 10**9).token_budget == 2048
    assert plan(free=400 * 10**9).token_budget == 16384
    assert plan(device=CPU, free=0).token_budget == 2048
    assert plan(token_budget=77).token_budget == 77


def test_a_pack_is_no_larger_than_a_rank_s_share_of_a_step():
    assert plan(lengths=np.full(128, 5)).token_budget == 640
    assert plan(lengths=np.full(128, 5), world_size=2).token_budget == 320


def test_activations_are_recomputed_where_memory_is_short():
    assert plan(free=10**9).gradient_checkpointing
    assert not plan(free=40 * 10**9).gradient_checkpointing
    assert not plan(free=10**9, gradient_checkpointing=False).gradient_checkpointing
    assert not plan(device=CPU, free=0).gradient_checkpointing
    assert plan(device=CPU, free=0, gradient_checkpointing=True).gradient_checkpointing


def test_long_runs_are_compiled():
    assert plan(device=CPU).compiled
    small = ModelSize(2, 64, 600, 100_000, 1000, 0)
    assert not plan(small, device=CPU).compiled
    assert plan(small, device=CPU, compile=True).compiled
    assert not plan(device=CPU, compile=False).compiled


def test_one_plan_for_all_ranks_fits_the_one_with_the_least_memory(monkeypatch):
    """Ranks that planned for themselves would pack differently, and disagree on the labels of a step."""
    free = {0: 40 * 10**9, 1: 24 * 10**9}
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free[0], 80 * 10**9))
    world = SimpleNamespace(
        world_size=2, device=CUDA, least=lambda mine: min(mine, free[1]), broadcast=lambda make: make()
    )
    found = resolve(FinetuneConfig(), LENGTHS, SEVEN_B, world)
    assert found.token_budget == 12 * 10**9 // (34 * 32 * 4096) > 2048


def test_what_the_load_will_take_is_not_free(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20 * 10**9, 24 * 10**9))
    size = ModelSize(32, 4096, 32_000, 7 * 10**9, 4_000_000, weights=7 * 10**9)
    assert free_bytes(CUDA, size) == 20 * 10**9 - 7 * 10**9 - 16 * 4_000_000
    assert free_bytes(CPU, size) == 0


@pytest.mark.parametrize("options", [{}, {"lora_target_modules": ["all-linear"]}, {"use_dora": True}])
@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_the_size_of_an_adapter_is_known_before_the_base_is_loaded(tiny_model, architecture, options):
    config = FinetuneConfig(base_model=str(tiny_model(architecture)), load_8bit=False, **options)
    base, spec = locate_base(config.base_model), DeviceSpec(CPU, torch.float32, 16)
    size, _ = check_model(config, base, spec)
    model = lora.attach(load_base(base, spec)[0], config, base)
    trained = sum(parameter.numel() for parameter in lora.trainable_parameters(model))
    whole = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert size.trainable == trained > 0
    assert size.parameters == sum(whole.values())
    assert size.weights == 4 * (size.parameters - trained)


def test_a_run_writes_no_more_than_was_estimated(tiny_llama, data_path, tmp_path):
    config = FinetuneConfig(
        base_model=str(tiny_llama), data_path=str(data_path), output_dir=str(tmp_path / "out"), batch_size=4,
        max_steps=5, save_steps=1, save_total_limit=2, eval_steps=2, val_set_size=4, cutoff_len=96, dtype="fp32",
        load_8bit=False, lora_r=64,
    )  # fmt: skip
    finetune(config)
    size, _ = check_model(config, locate_base(config.base_model), DeviceSpec(CPU, torch.float32, 16))
    tensors = sum(path.stat().st_size for path in (tmp_path / "out").rglob("checkpoint-*/*.safetensors"))
    needed = estimate_run(resolve_steps(config, 44, 1), config, np.full(44, 50), size, 1).disk
    assert needed == 3 * 4 * size.trainable * 4 == estimate.disk_bytes(size, config, 5, 1)
    assert 0.5 * needed < tensors < needed


def test_a_changed_option_changes_what_follows_from_it_and_nothing_else():
    short, long = FinetuneConfig(max_steps=100), FinetuneConfig(max_steps=200)
    before = plan(max_steps=100)
    before.token_budget = 1024  # as memory allowed
    now = updated(before, resolve_steps(short, 128, 1), resolve_steps(long, 128, 1))
    assert (now.total_steps, now.warmup_steps, now.eval_steps, now.token_budget) == (200, 20, 50, 1024)
