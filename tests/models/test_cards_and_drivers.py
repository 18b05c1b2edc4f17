"""What is said of CUDA cards and drivers that this torch cannot use, and how torch is set up for those that it can."""

import os
import warnings

import pytest
import torch
from command import refused
from engines import CPU, fit, make, rows, settings

from lora_alpaca.config import FinetuneConfig, GenerateConfig
from lora_alpaca.engine import fitting
from lora_alpaca.errors import ConfigError
from lora_alpaca.models import cards
from lora_alpaca.models.device import choose_device, pick_device

CUDA = torch.device("cuda")
BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.fixture
def card(monkeypatch):
    """Let torch see a card of a compute capability, and have kernels for some."""

    def see(capability, built=BUILT):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Some Card")
        monkeypatch.setattr("torch.cuda.get_arch_list", lambda: built)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: capability >= (8, 0))

    return see


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_cards_that_can(card, capability):
    card(capability)
    assert pick_device("auto") == CUDA
    card(capability, [])  # a build that does not tell
    assert pick_device("cuda") == CUDA


@pytest.mark.parametrize(
    ("capability", "built", "told"),
    [
        (
            (6, 1),
            BUILT,
            r"has compute capability 6\.1, and 7\.5 is needed \(Turing, of 2018, or newer\); say --device cpu",
        ),
        ((7, 0), ["sm_70"], r"has compute capability 7\.0, and 7\.5 is needed"),
        (
            (12, 0),
            BUILT[:-1],
            r"12\.0, and torch \S+ has kernels for sm_75, .*, sm_100; install .* or say --device cpu",
        ),
        ((8, 0), ["sm_86", "sm_90"], r"8\.0, and torch \S+ has kernels for sm_86, sm_90"),
        ((9, 0), ["sm_80", "sm_86"], r"9\.0, and torch"),
        ((10, 3), ["sm_100a", "sm_90"], r"10\.3, and torch"),
    ],
)
def test_cards_that_cannot_are_told_before_anything_is_loaded(card, capability, built, told):
    card(capability, built)
    with pytest.raises(ConfigError, match=told) as found:
        pick_device("auto")
    assert str(found.value).startswith("--device cuda: Some Card ")
    assert "\n" not in str(found.value)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize(
    ("capability", "built"), [((9, 0), ["sm_80", "compute_80"]), ((9, 0), ["sm_90a"]), ((8, 9), ["sm_86"])]
)
def test_kernels_that_serve_other_cards(card, capability, built):
    card(capability, built)
    assert pick_device("cuda") == CUDA


def test_a_verb_ends_with_that_line_before_it_looks_for_a_base(card, here):
    card((6, 1))
    line = refused("finetune", "--base_model", here / "nothing", "--data_path", "demo")
    assert line.startswith("error: --device cuda: Some Card has compute capability 6.1")


@pytest.mark.parametrize(
    ("built_for", "driver", "told"),
    [
        (
            "13.0",
            (11, 4),
            "its driver is for CUDA 11.4 at most, and torch 2.99.0 is built for CUDA 13.0; update the driver, or "
            "install a torch for CUDA 11",
        ),
        ("12.8", (12, 2), "torch 2.99.0 cannot use it; see nvidia-smi"),  # the driver is new enough
        (None, (12, 2), "torch 2.99.0 is built without CUDA; install one that is built with it"),
        ("13.0", None, ""),
    ],
)
def test_a_card_that_torch_does_not_see_is_told(monkeypatch, built_for, driver, told):
    monkeypatch.setattr(
        "torch.cuda.is_available", lambda: warnings.warn("CUDA initialization: too old", stacklevel=1) or False
    )
    monkeypatch.setattr("torch.version.cuda", built_for)
    monkeypatch.setattr("torch.__version__", "2.99.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cards, "driver_version", lambda: driver)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA initialization")
        assert cards.unused() == told
        notes = choose_device(GenerateConfig())[1]
        assert notes == ([f"the NVIDIA card of this machine is not used: {told}"] if told else [])
        assert choose_device(GenerateConfig(device="cpu"))[1] == []  # nobody asked for it
        with pytest.raises(ConfigError, match="--device cuda: torch sees no such device here; it sees cpu") as found:
            pick_device("cuda")
    assert str(found.value).endswith(f"; this machine has a card: {told}" if told else "cpu")


def test_a_card_that_the_user_hides_is_not_told(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(cards, "driver_version", lambda: (12, 2))
    assert cards.unused() == ""


class Driver:
    """The driver's library; each function returns 0 and writes its number."""

    def __init__(self, version, count):
        self._version, self._count = version, count

    def cuDriverGetVersion(self, number):
        number._obj.value = self._version
        return 0

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, number):
        number._obj.value = self._count
        return 0


@pytest.mark.parametrize(("version", "count", "found"), [(11040, 1, (11, 4)), (13000, 2, (13, 0)), (12020, 0, None)])
def test_the_version_of_the_driver(monkeypatch, version, count, found):
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver(version, count))
    assert cards.driver_version() == found


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert cards.driver_version() is None


@pytest.mark.parametrize(
    ("capability", "dtype", "override", "expected"),
    [
        ((8, 0), torch.float32, None, True),
        ((7, 5), torch.float32, None, False),
        ((8, 0), torch.bfloat16, None, False),
        ((8, 0), torch.float32, "0", False),
    ],
)
def test_where_fp32_is_rounded_to_tf32(card, monkeypatch, capability, dtype, override, expected):
    card(capability)
    monkeypatch.delenv(cards.OVERRIDE, raising=False)
    if override:
        monkeypatch.setenv(cards.OVERRIDE, override)
    assert cards.multiplies_in_tf32(CUDA, dtype) == expected
    assert not cards.multiplies_in_tf32(CPU, dtype)


def test_packs_are_compared_with_exact_products_and_trained_as_it_was_set(monkeypatch):
    products = torch.backends.cuda.matmul
    seen, real = [], fitting.compare

    def compared(*inputs, **options):
        seen.append(products.fp32_precision)
        return real(*inputs, **options)

    monkeypatch.setattr(fitting, "compare", compared)
    before = products.fp32_precision
    with cards.fp32_products(in_tf32=True):
        with fit(make("Llama"), settings(), rows()):
            assert products.fp32_precision == "tf32"
        assert products.fp32_precision == "tf32"
    assert seen == ["ieee"]
    assert products.fp32_precision == before


@pytest.mark.skipif(os.name == "nt", reason="no such segments")
@pytest.mark.parametrize(("name", "said"), [("", [cards.EXPANDABLE]), *((name, []) for name in cards.SETTINGS)])
def test_segments_grow_unless_the_user_says_how_memory_is_allocated(monkeypatch, name, said):
    for other in cards.SETTINGS:
        monkeypatch.delenv(other, raising=False)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    found = []
    monkeypatch.setattr("torch._C._accelerator_setAllocatorSettings", found.append)
    cards.expand_segments()
    assert found == said


def test_what_the_check_took_is_given_back_before_the_first_step(monkeypatch):
    released = []
    monkeypatch.setattr(fitting.memory, "release", released.append)
    with fit(make("Llama"), settings(), rows()):
        assert released == [CPU]
    with fit(make("Llama"), settings(checked=True), rows()):
        assert released == [CPU]  # nothing was checked


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_card_can_and_its_settings_hold():
    assert choose_device(FinetuneConfig())[0].device.type == "cuda"
    assert cards.driver_version() >= (12, 0)
    x = torch.randn(1024, 1024, device="cuda")
    exact = x.double() @ x.double()
    errors = {}
    for in_tf32 in (False, True):
        with cards.fp32_products(in_tf32):
            errors[in_tf32] = ((x @ x).double() - exact).norm() / exact.norm()
    assert errors[False] < 1e-5
    if cards.multiplies_in_tf32(CUDA, torch.float32):
        assert 1e-5 < errors[True] < 2e-3
