"""The plan of a run: from counted tokens and a model without weights, the same on every rank."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.meta import Weight, meta_model
from lora_alpaca.planning import estimate
from lora_alpaca.planning.estimate import Free, Layout, ModelSize
from lora_alpaca.planning.plan import choose_engine, estimate_run, resolve, resolve_steps, updated
from lora_alpaca.planning.size import model_size

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = np.array([100] * 64 + [500] * 64)


def seven_b(device=CUDA, bits=8, trains=False):
    """Return the size of a model of 32 layers of 0.2e9 parameters, 4096 wide."""
    layer = (Weight((50_000, 4096), outputs=40_000, is_trained=trains),)
    outside = (Weight((32_000, 4096), outputs=0, is_trained=trains),) * 2
    adapter = () if trains else ((8, 4096), (4096, 8)) * 64
    return ModelSize(32, 4096, 32_000, (outside, *[layer] * 32), adapter, DeviceSpec(device, torch.bfloat16, bits))


def plan(size=None, free=40 * 10**9, lengths=LENGTHS, world_size=1, **options):
    """Return the plan of a run on devices that have so many bytes free once the model is on them."""
    config, size = FinetuneConfig(**options), size or seven_b()
    layout = Layout(world_size)
    taken = estimate.memory(size, layout).device.total
    return choose_engine(
        resolve_steps(config, len(lengths), world_size), config, lengths, size, layout, Free(taken + free, 0)
    )


def world(device=CUDA, ranks=2, least=lambda mine: mine):
    return SimpleNamespace(
        world_size=ranks, per_machine=ranks, device=device, least=least, broadcast=lambda make: make()
    )


def test_packs_on_a_gpu_are_as_large_as_half_of_its_memory():
    a_token = estimate.activation_bytes(seven_b())
    assert plan(free=40 * 10**9).token_budget == 20 * 10**9 // a_token
    assert plan(free=14 * 10**9).token_budget == 7 * 10**9 // a_token < 2048
    assert plan(free=4 * 10**9).token_budget == 2 * 10**9 // estimate.activation_bytes(seven_b(), True) > 2048
    assert plan(free=400 * 10**9).token_budget == 16384
    assert plan(seven_b(CPU)).token_budget == 2048
    assert plan(token_budget=77).token_budget == 77


def test_a_pack_is_no_larger_than_a_rank_s_share_of_a_step():
    assert plan(lengths=np.full(128, 5)).token_budget == 640
    assert plan(lengths=np.full(128, 5), world_size=2).token_budget == 320


def test_activations_are_recomputed_where_memory_is_short():
    assert plan(free=10**9).gradient_checkpointing
    assert not plan(free=40 * 10**9).gradient_checkpointing
    assert not plan(free=10**9, gradient_checkpointing=False).gradient_checkpointing
    assert not plan(seven_b(CPU), free=0).gradient_checkpointing
    assert plan(seven_b(CPU), free=0, gradient_checkpointing=True).gradient_checkpointing


@pytest.mark.parametrize(
    ("gigabytes", "wanted", "bits", "recomputes"),
    [
        (7, 1024, 16, False),  # 729 tokens, each 1.6 times as fast as one of 1,024 that is computed once more
        (7, 16_384, 16, False),
        (7, 16_384, 8, True),  # whose weights take longer to read than the products of 729 tokens take
        (14, 16_384, 8, False),
        (4, 16_384, 16, True),  # 416 tokens are too few
    ],
)
def test_activations_are_recomputed_where_that_takes_less_time(gigabytes, wanted, bits, recomputes):
    found = plan(seven_b(bits=bits), gigabytes * 10**9, np.full(128, 128), batch_size=wanted // 128)
    assert found.gradient_checkpointing == recomputes
    parts = estimate.memory(seven_b(bits=bits), Layout(1), found.token_budget, recomputes).device
    assert parts.activations <= gigabytes * 10**9 / 2


def test_a_row_that_fits_only_where_it_is_recomputed():
    assert not plan(free=14 * 10**9, lengths=np.full(128, 400)).gradient_checkpointing
    assert plan(free=14 * 10**9, lengths=np.array([400] * 127 + [2000])).gradient_checkpointing


def test_long_runs_are_compiled():
    assert plan(seven_b(CPU)).compiled
    small = ModelSize(
        2, 64, 600, ((Weight((600, 64), outputs=0, is_trained=False),),), (), DeviceSpec(CPU, torch.float32, 16)
    )
    assert not plan(small).compiled
    assert plan(small, compile=True).compiled
    assert not plan(seven_b(CPU), compile=False).compiled


def test_one_plan_for_all_ranks_fits_the_one_with_the_least_memory(monkeypatch):
    """Ranks that planned for themselves would pack differently, and disagree on the labels of a step."""
    taken = estimate.memory(seven_b(), Layout(2)).device.total
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (taken + 40 * 10**9, 80 * 10**9))
    found = resolve(FinetuneConfig(), LENGTHS, seven_b(), world(least=lambda mine: min(mine, taken + 24 * 10**9)))
    assert found.token_budget == 12 * 10**9 // estimate.activation_bytes(seven_b()) > 2048
    assert found.shard == "none"


@pytest.mark.parametrize(
    ("gigabytes", "ranks", "options", "shard"),
    [
        (80, 4, {}, "none"),
        (10, 4, {}, "full"),
        (10, 1, {}, "none"),  # which the checks before refuse
        (10, 4, {"shard": "none"}, "none"),
        (10, 1, {"shard": "full"}, "none"),
        (10, 1, {"offload": "cpu"}, "full"),
        (80, 4, {"shard": "grads"}, "grads"),
        (80, 4, {"offload": "cpu"}, "full"),
        (80, 4, {"shard_size": 2}, "full"),
    ],
)
def test_weights_are_sharded_where_one_device_does_not_hold_them(monkeypatch, gigabytes, ranks, options, shard):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (gigabytes * 10**9, 80 * 10**9))
    size = seven_b(bits=16)
    for name, value in {"WORLD_SIZE": ranks, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert resolve(FinetuneConfig(**options), LENGTHS, size, world(ranks=ranks)).shard == shard


def test_what_is_trained_decides_with_the_weights_whether_they_are_sharded(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (40 * 10**9, 80 * 10**9))
    assert resolve(FinetuneConfig(), LENGTHS, seven_b(bits=16), world(ranks=8)).shard == "none"
    config = FinetuneConfig(tune="full", load_8bit=False)
    assert resolve(config, LENGTHS, seven_b(bits=16, trains=True), world(ranks=8)).shard == "full"


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    """Two ranks of one CPU have half of its memory each; on two machines each has all of it."""
    taken = estimate.memory(seven_b(CPU, 16), Layout(2), 2048, recomputes=True).device.total
    monkeypatch.setattr("lora_alpaca.models.memory.free_of_host", lambda: taken + 10**9)
    together, apart = world(CPU), world(CPU)
    apart.per_machine = 1
    assert resolve(FinetuneConfig(), LENGTHS, seven_b(CPU, 16), together).shard == "full"
    assert resolve(FinetuneConfig(), LENGTHS, seven_b(CPU, 16), apart).shard == "none"


@pytest.mark.parametrize("options", [{}, {"lora_target_modules": ["all-linear"]}, {"use_dora": True}])
@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_the_size_of_an_adapter_is_known_before_the_base_is_loaded(tiny_model, architecture, options):
    config = FinetuneConfig(base_model=str(tiny_model(architecture)), load_8bit=False, **options)
    base, spec = locate_base(config.base_model), DeviceSpec(CPU, torch.float32, 16)
    size = model_size(config, base, spec, meta_model(base))
    model = lora.attach(load_base(base, spec)[0], config, base)
    trained = sum(parameter.numel() for parameter in lora.trainable_parameters(model))
    whole = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert size.trainable == trained > 0
    assert size.parameters == sum(whole.values())
    assert estimate.memory(size, Layout()).device.weights == 4 * (size.parameters - trained)


def test_a_run_writes_no_more_than_was_estimated(tiny_llama, data_path, tmp_path):
    config = FinetuneConfig(
        base_model=str(tiny_llama), data_path=str(data_path), output_dir=str(tmp_path / "out"), batch_size=4,
        max_steps=5, save_steps=1, save_total_limit=2, eval_steps=2, val_set_size=4, cutoff_len=96, dtype="fp32",
        load_8bit=False, lora_r=64,
    )  # fmt: skip
    finetune(config)
    base = locate_base(config.base_model)
    size = model_size(config, base, DeviceSpec(CPU, torch.float32, 16), meta_model(base))
    tensors = sum(path.stat().st_size for path in (tmp_path / "out").rglob("checkpoint-*/*.safetensors"))
    needed = estimate_run(resolve_steps(config, 44, 1), config, np.full(44, 50), size, Layout()).disk
    assert needed == 4 * (12 * size.trainable + 4 * len(size.adapter)) == estimate.disk_bytes(size, config, 5, 1)
    assert 0.5 * needed < tensors < needed


def test_a_changed_option_changes_what_follows_from_it_and_nothing_else():
    short, long = FinetuneConfig(max_steps=100), FinetuneConfig(max_steps=200)
    before = plan(max_steps=100)
    before.token_budget = 1024  # as memory allowed
    now = updated(before, resolve_steps(short, 128, 1), resolve_steps(long, 128, 1))
    assert (now.total_steps, now.warmup_steps, now.eval_steps, now.token_budget) == (200, 20, 50, 1024)
