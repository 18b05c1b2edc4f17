"""The optimizers that --optimizer names: what they move, what decays, and their state by name, there and back."""

import pytest
import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import ConfigError
from lora_alpaca.training import optimizers

KINDS = ("adamw", "adamw_8bit", "adafactor")
NAMES = ["layer.weight", "layer.bias"]


def made(kind, tune="full", **options):
    """Return an optimizer, its parameters, and a function that takes a step with the gradients of a seed."""
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((80, 64), (80,))]
    optimizer = optimizers.build(FinetuneConfig(optimizer=kind, tune=tune, **options), NAMES, parameters)

    def step(seed, rate=1e-2):
        draw = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    return optimizer, parameters, step


@pytest.mark.parametrize("kind", KINDS)
def test_state_by_name_goes_on_as_if_nothing_had_happened(kind):
    optimizer, parameters, step = made(kind)
    again, others, step_again = made(kind)
    assert optimizers.state(optimizer, NAMES, parameters) == {}
    for seed in range(3):
        step(seed)
    kept = {name: value.clone() for name, value in optimizers.state(optimizer, NAMES, parameters).items()}
    assert {name.rpartition(".")[0] for name in kept} == set(NAMES)
    assert all(isinstance(value, torch.Tensor) for value in kept.values())
    optimizers.load_state(again, NAMES, others, kept)
    with torch.no_grad():
        for one, other in zip(parameters, others, strict=True):
            other.copy_(one)
    for seed in range(3, 5):
        step(seed)
        step_again(seed)
    assert all(torch.equal(one, other) for one, other in zip(parameters, others, strict=True))


def test_adamw_in_8_bits_moves_as_adamw_does_but_for_rounding():
    moved = {}
    for kind in ("adamw", "adamw_8bit"):
        optimizer, parameters, step = made(kind)
        before = parameters[0].detach().clone()
        for seed in range(3):
            step(seed)
        moved[kind] = parameters[0].detach() - before
        if kind == "adamw_8bit":
            assert optimizer.state[parameters[0]]["state1"].dtype == torch.uint8
    assert (moved["adamw"] - moved["adamw_8bit"]).norm() < 0.2 * moved["adamw"].norm()


def test_adafactor_takes_the_learning_rate_as_it_is():
    """Its first update is the sign of the gradient, nearly: every weight moves by the rate, at a zero weight too."""
    optimizer, parameters, step = made("adafactor")
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1e-3)
    before = parameters[1].detach().clone()
    step(0, rate=1e-2)
    assert torch.allclose((parameters[1] - before).abs(), torch.full((80,), 1e-2), rtol=1e-3)
    held = optimizers.state(optimizer, NAMES, parameters)
    assert held["layer.weight.row_var"].numel() + held["layer.weight.col_var"].numel() == 80 + 64


@pytest.mark.parametrize(("tune", "decays"), [("full", [True, False]), ("lora", [True, True])])
def test_norms_and_biases_of_a_base_do_not_decay(tune, decays):
    _, parameters, _ = made("adamw", tune, weight_decay=0.1)
    optimizer, parameters, _ = made("adamw", tune, weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    found = [not torch.equal(one, other) for one, other in zip(parameters, before, strict=True)]
    assert found == decays


@pytest.mark.parametrize("kind", ["adamw_8bit", "adafactor"])
def test_what_takes_whole_weights_is_refused_where_they_are_spread(kind):
    full = FinetuneConfig(tune="full", optimizer=kind)
    with pytest.raises(ConfigError, match=f"--optimizer {kind} takes whole weights, and --shard full spreads them"):
        optimizers.require_whole(full, "full")
    optimizers.require_whole(full, "none")
    optimizers.require_whole(FinetuneConfig(optimizer=kind), "full")  # an adapter is whole on every rank


def test_without_bitsandbytes_its_optimizer_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="--optimizer adamw_8bit: bitsandbytes cannot do it on cpu"):
        made("adamw_8bit")


@pytest.mark.parametrize("kind", KINDS)
def test_lora_plus_moves_b_faster_than_a(kind):
    """The first step of all three is the rate itself, in every entry, whatever the gradient."""
    names = ["q.lora_A.default.weight", "q.lora_B.default.weight", "q.lora_magnitude_vector.default.weight"]
    parameters = [torch.nn.Parameter(torch.zeros(80, 64)) for _ in names]
    optimizer = optimizers.build(FinetuneConfig(optimizer=kind, lora_plus_ratio=16), names, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizers.set_rate(optimizer, 1e-3)
    optimizer.step()
    moved = [float(-parameter.detach().mean()) for parameter in parameters]
    assert moved == pytest.approx([1e-3, 16e-3, 16e-3], rel=1e-2)


def test_without_lora_plus_all_of_an_adapter_is_one_group():
    parameters = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    optimizer = optimizers.build(FinetuneConfig(weight_decay=0.1), ["q.lora_A.x", "q.lora_B.x"], parameters)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]
