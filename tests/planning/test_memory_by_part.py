"""What a run takes of memory, by part: the formulas against tensors that are counted, and what follows from them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lora_alpaca import FinetuneConfig, ModelError
from lora_alpaca.models.base import Base, load_base, locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.meta import meta_model
from lora_alpaca.planning import estimate, preflight
from lora_alpaca.planning.estimate import Layout
from lora_alpaca.planning.size import model_size

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LLAMA_7B = transformers.LlamaConfig(vocab_size=32000)  # its other defaults are those of the published model


def size_of(base, device=CPU, dtype=torch.float32, bits=16, **options):
    """Return the size of a base, which a path or a config gives, with what a run trains of it."""
    base = base if isinstance(base, Base) else locate_base(str(base))
    return model_size(FinetuneConfig(**options), base, DeviceSpec(device, dtype, bits), meta_model(base))


def a_base(config):
    return Base("a-llama", "a-llama", None, False, config)


def counted(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ------------------------------------------------------------------------------------- counted against the formulas


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "GPT2", "OPT"])
def test_the_weights_of_a_base(tiny_model, architecture, bits):
    base = locate_base(str(tiny_model(architecture)))
    loaded, _ = load_base(base, DeviceSpec(CPU, torch.bfloat16, bits))
    held = [parameter.data for parameter in loaded.parameters()]
    for parameter in loaded.parameters():
        if (scales := getattr(parameter, "SCB", None)) is not None:
            held.append(scales)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            held += [state.absmax, state.state2.absmax]
    found = estimate.memory(size_of(base, dtype=torch.bfloat16, bits=bits, load_8bit=False), Layout())
    assert found.device.weights == counted(held)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_the_state_of_an_optimizer(tiny_llama, optimizer):
    size = size_of(tiny_llama, tune="full", optimizer=optimizer, load_8bit=False)
    model, _ = load_base(locate_base(str(tiny_llama)), DeviceSpec(CPU, torch.float32, 16))
    parameters = [torch.nn.Parameter(parameter.clone()) for parameter in model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if optimizer == "adamw_8bit":
        made = pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters)
    else:
        made = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}[optimizer](parameters)
    made.step()
    tables = ("qmap1", "qmap2")  # of 8 bits, one for all parameters
    kept = [
        value
        for state in made.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name not in tables
    ]
    found = estimate.memory(size, Layout()).device
    assert found.optimizer == counted(kept)
    assert found.trained == found.gradients == counted(parameters)
    assert found.weights == 0


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_share_of_a_rank(tiny_llama, ranks):
    """What FSDP holds on one of so many ranks, whose rows are cut unevenly and filled up."""
    model, _ = load_base(locate_base(str(tiny_llama)), DeviceSpec(CPU, torch.float32, 16))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        shards = counted(parameter.to_local() for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
    layout = Layout(ranks, ranks, "full", ranks)
    size = size_of(tiny_llama, load_8bit=False)
    assert estimate.memory(size, layout).device.weights == shards
    full = estimate.memory(size_of(tiny_llama, tune="full", load_8bit=False), layout).device
    assert (full.weights, full.trained, full.gradients) == (0, shards, shards)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, lambda name: True),
        ({"layers": "top:1"}, lambda name: "layers.1." in name),
        ({"layers": "top:1", "layer_parts": "mlp"}, lambda name: "layers.1.mlp" in name),
    ],
)
def test_what_full_finetuning_trains(tiny_llama, options, names):
    size = size_of(tiny_llama, tune="full", load_8bit=False, **options)
    model = meta_model(locate_base(str(tiny_llama)))
    assert size.trainable == sum(one.numel() for name, one in model.named_parameters() if names(name))
    assert size.adapter == ()


# --------------------------------------------------------------------------------------------------- what follows


@pytest.fixture(scope="module")
def seven_b():
    """Return a function that returns the size of Llama 2 7B."""
    return lambda bits=16, **options: size_of(a_base(LLAMA_7B), CUDA, torch.bfloat16, bits, load_8bit=False, **options)


def test_a_published_model(seven_b):
    """6.74e9 parameters are 13.5 GB in 16 bits; with masters, gradients and moments in fp32 16 bytes each."""
    size = seven_b()
    assert size.parameters - size.trainable == 6_738_415_616
    assert size.trainable == 4_194_304  # of an adapter of rank 8 on q and v, as alpaca-lora has it
    assert estimate.memory(size, Layout()).device.weights == 2 * 6_738_415_616
    full = estimate.memory(seven_b(tune="full"), Layout()).device
    steps = 4 * len(size.weights)
    assert full.trained + full.gradients + full.optimizer == 16 * 6_738_415_616 + steps


def test_shards_are_on_the_host_where_they_are_offloaded(seven_b):
    for options in ({}, {"tune": "full"}):
        size = seven_b(**options)
        there = estimate.memory(size, Layout(4, 4, "full", 4), 2048)
        away = estimate.memory(size, Layout(4, 4, "full", 4, offloads=True), 2048)
        assert away.device + away.host == there.device
        assert away.host.weights + away.host.trained == (2 if not options else 4) * 6_738_415_616 / 4
    assert away.device.optimizer == 0
    on_cpu = replace(size, spec=replace(size.spec, device=CPU))
    assert estimate.memory(on_cpu, Layout(4, 4, "full", 4, offloads=True)).host.total == 0


def test_what_is_gathered_at_a_time(seven_b):
    """Two layers, and what is outside of them; `grads` keeps all; what is trained has gradients on their way."""
    size = seven_b()
    outside, layer = 2 * 2 * 32_000 * 4096 + 2 * 4096, 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert estimate.memory(size, Layout(8, 8, "full", 8)).device.gathered == outside + 2 * layer
    assert estimate.memory(size, Layout(8, 8, "grads", 8)).device.gathered == outside + 33 * layer
    assert estimate.memory(size, Layout()).device.gathered == 0
    full = estimate.memory(seven_b(tune="full"), Layout(8, 8, "full", 8)).device
    assert full.gathered == outside + 2 * layer + 6 * max(outside, layer) // 2
    assert full.weights == 0


def test_fewer_ranks_that_share_a_copy_hold_more_of_it(seven_b):
    by_two = estimate.memory(seven_b(), Layout(8, 8, "full", 2)).device.weights
    assert by_two == 4 * estimate.memory(seven_b(), Layout(8, 8, "full", 8)).device.weights


def test_activations_that_are_recomputed_are_one_layer_and_the_inputs_of_all(seven_b):
    kept = estimate.memory(seven_b(), Layout(), tokens=100).device.activations
    recomputed = estimate.memory(seven_b(), Layout(), tokens=100, recomputes=True).device.activations
    layer = 2 * (4 * 4096 + 2 * 11008 + 4096 + 8 * 4096 + 2 * 5 * 1024)  # outputs, 8 values, two drop-outs
    assert kept == 100 * 32 * layer
    assert recomputed == 100 * (32 * 2 * 4096 + layer)


def test_the_ranks_of_a_cpu_map_one_file(tiny_llama):
    """Weights that are views of their file are in memory once; another dtype, or bits, is a copy for each rank."""
    size = size_of(tiny_llama, load_8bit=False)
    assert size.is_mapped
    alone, two = (estimate.memory(size, Layout(ranks, ranks)).device.weights for ranks in (1, 2))
    assert two == alone // 2
    for other in (size_of(tiny_llama, dtype=torch.bfloat16), size_of(tiny_llama, bits=8)):
        assert not other.is_mapped
        alone, two = (estimate.memory(other, Layout(ranks, ranks)).device.weights for ranks in (1, 2))
        assert two == alone


def test_a_full_checkpoint_has_twelve_bytes_a_parameter_and_the_model_two(seven_b):
    config = FinetuneConfig(tune="full", load_8bit=False, save_total_limit=2)
    size = seven_b(tune="full")
    checkpoint = 12 * size.parameters + 4 * len(size.weights)
    assert estimate.disk_bytes(size, config, total_steps=1000, save_steps=200) == 4 * checkpoint
    of_top = seven_b(tune="full", layers="top:1", layer_parts="mlp")
    written = estimate.disk_bytes(of_top, config, total_steps=10, save_steps=200)
    assert written == 12 * of_top.trainable + 4 * 3 + 2 * of_top.parameters  # the model is more than a checkpoint


def test_a_save_takes_no_more_than_the_largest_weight(seven_b):
    assert estimate.save_bytes(seven_b(tune="full")) == (4 + 2) * 32_000 * 4096
    assert estimate.save_bytes(seven_b()) == (4 + 2) * 8 * 4096


# ------------------------------------------------------------------------------------------------------- refusals


def refusal(monkeypatch, device_gb, host_gb=64, ranks=1, device=CUDA, bits=16, config=LLAMA_7B, **options):
    """Return the line that refuses a run for its memory, an empty one where it is not refused."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (int(device_gb * 1e9), int(device_gb * 1e9)))
    monkeypatch.setattr("lora_alpaca.models.memory.free_of_host", lambda: int(host_gb * 1e9))
    world = SimpleNamespace(
        world_size=ranks, per_machine=ranks, device=device, least=lambda mine: mine, broadcast=lambda make: make()
    )
    options = {"load_8bit": False} | options
    base = a_base(config)
    size = size_of(base, device, torch.bfloat16, bits, **options)
    try:
        preflight.check_memory(FinetuneConfig(**options), base, size, world)
        return ""
    except ModelError as error:
        assert "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize(
    ("machine", "options", "remedy"),
    [
        ({"device_gb": 24}, {}, ""),
        ({"device_gb": 12, "ranks": 2}, {}, ""),  # auto shards
        ({"device_gb": 12, "ranks": 2}, {"shard": "none"}, "with --shard full it takes "),
        ({"device_gb": 7, "ranks": 2}, {}, "with --offload cpu it takes "),
        ({"device_gb": 7, "ranks": 2}, {"shard": "none"}, "with --shard full --offload cpu it takes "),
        ({"device_gb": 12}, {}, "with --offload cpu it takes "),
        ({"device_gb": 12, "host_gb": 10}, {}, "with --load_8bit it takes "),
        ({"device_gb": 6, "host_gb": 4}, {}, "with --load_4bit it takes "),
        ({"device_gb": 4, "host_gb": 1}, {}, "take a smaller model, or 16 such devices with --shard full"),
        ({"device_gb": 1, "host_gb": 1}, {}, "take a smaller model"),
        ({"device_gb": 40, "ranks": 4}, {"tune": "full"}, ""),
        ({"device_gb": 24, "ranks": 4, "host_gb": 500}, {"tune": "full"}, "with --offload cpu it takes "),
        (
            {"device_gb": 24, "ranks": 4},
            {"tune": "full"},
            "with --layers top:25 --token_budget 512 it takes ",
        ),  # 8-bit moments are whole
        ({"device_gb": 100, "host_gb": 9}, {"tune": "full"}, "with --optimizer adamw_8bit it takes "),
        ({"device_gb": 100, "host_gb": 9, "ranks": 2}, {"tune": "full", "optimizer": "adamw_8bit"}, ""),
        ({"device_gb": 12, "ranks": 2}, {"use_dora": True}, "with --load_8bit it takes "),
        ({"device_gb": 24}, {"tune": "full"}, "with --offload cpu --layers top:17 it takes "),
        ({"device_gb": 24, "host_gb": 9}, {"tune": "full"}, "with --layers top:3 it takes "),
        ({"device_gb": 15.2, "host_gb": 9}, {"tune": "full", "layers": "top:1"}, "with --tune lora it takes "),
        ({"device_gb": 12, "host_gb": 9}, {"tune": "full"}, "with --tune lora --load_8bit it takes "),
        ({"host_gb": 40, "device_gb": 0, "device": CPU, "ranks": 2}, {}, ""),
        (
            {"host_gb": 16, "device_gb": 0, "device": CPU, "ranks": 2},
            {},
            "with --load_8bit --token_budget 512 it takes ",
        ),
        ({"host_gb": 1, "device_gb": 0, "device": CPU}, {}, "take a smaller model"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cheapest_change(monkeypatch, machine, options, remedy):
    line = refusal(monkeypatch, **machine, **options)
    assert bool(line) == bool(remedy)
    if remedy:
        assert line.startswith("--base_model a-llama: as unquantised base, bf16 compute on c")
        said = line.partition("free for it; ")[2]
        assert said.startswith(remedy)
        if said.startswith("with "):  # what is named is accepted, and fits
            named = options_of(said.removeprefix("with ").partition(" it takes ")[0].split())
            assert not refusal(monkeypatch, **machine, **options | named)


def options_of(words):
    """Return the options that a refusal names, as `refusal` takes them."""
    found, left = {}, iter(words)
    for flag in left:
        if flag in ("--load_8bit", "--load_4bit"):
            found["bits"] = int(flag[7])
        else:
            found[flag.removeprefix("--")] = next(left)
    return found


def test_the_plan_says_memory_by_part(seven_b):
    found = str(estimate.memory(seven_b(tune="full"), Layout(8, 8, "full", 8), 2048, recomputes=True))
    assert found == (
        "17.5 GB (trained 3.4 GB, gradients 3.4 GB, optimizer 6.7 GB, gathered 2.9 GB, activations 0.8 GB, "
        "logits 0.3 GB)"
    )
    away = str(estimate.memory(seven_b(), Layout(4, 4, "full", 4, offloads=True), 2048))
    assert away.endswith("; of the host 3.4 GB (weights 3.4 GB)")
    assert math.isclose(sum(float(part.split()[1]) for part in found.partition("(")[2].split(", ")), 17.3, abs_tol=0.3)
