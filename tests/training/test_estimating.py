"""The verb estimate: what a run would take, of a config.json alone, on devices that are not here, and measured here."""

import json
import re
import runpy
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import transformers
from command import refused, run
from conftest import ROOT

from lora_alpaca.config import EstimateConfig, FinetuneConfig
from lora_alpaca.config.estimating import DeviceName
from lora_alpaca.data.examples import Examples
from lora_alpaca.models.base import demo_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.planning import timing
from lora_alpaca.planning.devices import TABLE
from lora_alpaca.planning.estimate import Parts
from lora_alpaca.planning.plan import resolve_steps
from lora_alpaca.planning.timing import StepWork
from lora_alpaca.training.estimating import measuring, probe
from lora_alpaca.training.estimating.counting import compute
from lora_alpaca.training.estimating.estimating import _of_layers, forecast
from lora_alpaca.training.estimating.peak import Peak, live

ALPACA = ("--rows", 1000, "--mean_tokens", 122)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return a folder with nothing but the config.json of Llama 7B."""
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaConfig(vocab_size=32000, dtype="float16").save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def estimated(llama, *words):
    """Return what the command prints for programs."""
    found = run("estimate", "--base_model", llama, "--json", *words)
    assert found.code == 0, found.err
    return json.loads(found.out)


def test_a_config_is_enough(llama):
    found = estimated(llama, "--on", "rtx4090", "--price_per_hour", 0.4, *ALPACA)
    parts = found["memory"]
    assert found["fits"] and not found["remedies"]
    assert parts["peak"] == sum(parts[name] for name in parts if name not in ("peak", "host", "mapped", "basis"))
    assert parts["weights"] == pytest.approx(6.74e9 + 0.26e9, rel=0.02)  # 8 bits, embedding and head in 16
    assert found["steps"] == 3 * 8
    assert found["tokens"] == 122 * 128 * found["steps"]
    seconds = found["seconds"]
    assert seconds["total"] == pytest.approx(seconds["start"] + seconds["training"] + seconds["validation"])
    assert seconds["basis"].startswith("estimated")
    assert found["money"] == pytest.approx(0.4 * seconds["total"] / 3600)
    assert found["disk"] > 0


def test_what_does_not_fit_comes_with_changes_that_do(llama):
    found = estimated(llama, "--on", "rtx3060", "--load_8bit", False, "--engine", "packed", *ALPACA)
    assert not found["fits"]
    assert found["memory"]["peak"] > found["free"]
    options = [one["options"] for one in found["remedies"]]
    assert "--load_8bit" in options and len({*options}) == len(options)
    assert all(one["memory"] < found["free"] and one["times"] > 0 for one in found["remedies"])
    words = options[options.index("--load_8bit")].split()
    assert estimated(llama, "--on", "rtx3060", *words, *ALPACA)["fits"]


def test_the_words_of_an_estimate(llama):
    found = run("estimate", "--base_model", llama, "--on", "rtx3060", "--load_8bit", False, *ALPACA)
    assert found.code == 0, found.err
    for said in (
        "memory of a device (by formulas):",
        "  libraries",
        "  peak",
        "it does not fit",
        "times as long",
        "disk:",
    ):
        assert said in found.out
    assert "rows: 900 rows of 122 tokens, assumed" in found.out


@pytest.mark.parametrize("name", TABLE)
def test_every_device(llama, name):
    found = forecast(EstimateConfig(base_model=str(llama), on=name, rows=200, mean_tokens=100))
    assert found.total_seconds > 0
    assert found.device == TABLE[name].name
    assert TABLE[name].source


def test_the_table_has_the_devices_that_the_flag_names():
    assert list(get_args(DeviceName)) == ["here", *TABLE]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on", "rtx9999"], "--on rtx9999: input should be 'here', 't4'"),
        (["--devices", 0], "--devices 0: input should be greater than or equal to 1"),
        (["--rows", 0], "--rows 0: input should be greater than or equal to 1"),
        (["--mean_tokens", 100], "--mean_tokens 100 is for so many rows: say --rows N too"),
        (["--devices", 3], "--batch_size 128 is no multiple of 3 devices"),
        (["--lora_alpha", "many"], "--lora_alpha many: input should be"),
    ],
)
def test_wrong_words(llama, words, said):
    assert said in refused("estimate", "--base_model", llama, *words)


def test_rows_that_cannot_be_had_name_the_way_on(llama):
    line = refused("estimate", "--base_model", llama, "--on", "t4")
    assert line.endswith("; say --rows N --mean_tokens M, and the rows are not needed")


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 40), (torch.bfloat16, 64)])
def test_tokens_are_counted_in_packs_as_they_are_computed(dtype, tokens):
    """On a CPU in 16 bits a pack is filled up to a length that comes again."""
    spans = np.array([[5, 21], [5, 21]], np.int32)  # two rows of 21 tokens, of which the last is not fed
    train = Examples(np.arange(42, dtype=np.int32), np.array([0, 21, 42]), spans, np.arange(3), np.arange(2))
    run = FinetuneConfig(batch_size=2, num_epochs=1)
    plan = replace(resolve_steps(run, 2, 1), engine="packed")
    spec = DeviceSpec(torch.device("cpu"), dtype, 16)
    assert compute(SimpleNamespace(train=train), run, plan, spec, 1).tokens == tokens


def test_without_a_tokenizer_rows_are_as_long_as_the_cutoff(llama, data_path):
    found = estimated(llama, "--on", "t4", "--data_path", data_path, "--val_set_size", 0, "--batch_size", 8)
    assert found["rows"].startswith("48 rows of 512 tokens, assumed, for the base has no tokenizer")


def test_rows_that_are_there_are_counted(data_path):
    found = estimated("demo", "--on", "t4", "--data_path", data_path, "--val_set_size", 0)
    assert re.fullmatch(r"48 rows, [\d,]+ tokens, counted", found["rows"])


@pytest.mark.parametrize("name", ["t4", "h100", "m1-ultra"])
def test_more_work_never_takes_less(llama, name):
    base = {"base_model": str(llama), "on": name, "rows": 200, "mean_tokens": 100, "load_8bit": False}
    base["gradient_checkpointing"] = False
    least = forecast(EstimateConfig(**base))
    for more in ({"mean_tokens": 200}, {"rows": 800}, {"num_epochs": 5}, {"gradient_checkpointing": True}):
        assert forecast(EstimateConfig(**base | more)).seconds["training"] > least.seconds["training"], more
    assert forecast(EstimateConfig(**base | {"lora_r": 64})).parts.total > least.parts.total
    top = forecast(EstimateConfig(**base | {"layers": "top:2"}))
    assert top.seconds["training"] < least.seconds["training"]
    assert top.parts.activations < least.parts.activations


def test_a_device_that_is_faster_in_all_takes_less(llama):
    size = forecast_size(llama)
    work = StepWork(16_000, 8000, 8, 122)
    slow, fast = TABLE["a100-40"], replace(TABLE["a100-40"], bf16=400e12, bandwidth=2e12)
    assert timing.step_seconds(fast, size, work, False) < timing.step_seconds(slow, size, work, False)


def forecast_size(llama):
    """Return the size of the model, as on an A100."""
    from lora_alpaca.models.base import locate_base
    from lora_alpaca.models.meta import meta_model
    from lora_alpaca.planning.size import model_size

    config = EstimateConfig(base_model=str(llama)).run
    base = locate_base(str(llama))
    return model_size(config, base, TABLE["a100-40"].spec(config)[0], meta_model(base))


# -------------------------------------------------------------------------------------------------------- measured


def figures(seconds, saved):
    """Return what is measured at a depth; a layer takes a second of a step."""
    phases = {"start": 3.0, "load": 1.0, "check": 6.0, "first step": seconds, "step": seconds, "update": 0.5}
    return {"seconds": phases | {"validation": seconds / 3, "report": 0.2}, "saved": saved}


MEASURED = {
    "depths": [figures(6.0, 80), figures(4.0, 40)],  # of 4 and of 2 layers
    "peaks": {"start": 500, "load": 520, "check": 900},
    "live": {"load": 320, "first step": 600, "step": 620, "update": 340},
    "tokens": 10,
    "checked": 5,
}


def test_what_is_measured_is_drawn_on_to_all_layers():
    """Time grows as two depths differ, memory by what a layer is known to keep; what does not grow stays."""
    parts = Parts(weights=2200, trained=110, gradients=110, optimizer=220, activations=1, logits=1)
    found = probe.drawn_on(MEASURED, 22, [4, 2], parts, 0.6, "measured")
    assert found.step_seconds(20) == pytest.approx((6 + 18 - 0.5) * 2 + 0.5)
    assert found.forward_seconds(10) == pytest.approx(2 + 18 / 3)
    assert found.seconds["check"] == pytest.approx(6 + 18 * probe.CHECKS * 0.5)  # half the tokens of a step
    assert (found.seconds["start"], found.seconds["report"]) == (3, 0.2)
    assert found.saved == 80 + 18 * 20
    added = 18 / 22 * (2200 + 440)
    live, lasting = 620 + added + 18 * 20, 340 + added
    assert found.peak == int(200 + live + 0.6 * (live - lasting) + 18 / 22 * 110)
    assert found.start == 500


def test_a_check_that_takes_more_than_a_step_is_the_peak():
    found = probe.drawn_on(
        MEASURED | {"peaks": {"start": 500, "load": 520, "check": 9000}}, 22, [4, 2], Parts(), 0.6, ""
    )
    assert found.peak == 9000


def test_a_model_that_is_measured_whole_is_not_drawn_on():
    found = probe.drawn_on(MEASURED | {"depths": [figures(6.0, 80)]}, 4, [4], Parts(weights=10**9), 0.6, "")
    assert found.step_seconds(10) == 6 and found.saved == 80
    assert found.peak == max(900, int(200 + 620 + 0.6 * (620 - 340)))


def test_embeddings_and_head_are_in_no_layer(tiny_llama):
    """A model with twice the layers has twice of what lasts in layers, and the same outside."""
    size, parts = forecast_size(tiny_llama), Parts(weights=1_000_000, trained=1000, gradients=1000, optimizer=2000)
    found = _of_layers(parts, size)
    outside, *layers = [sum(one.numel for one in unit if one.outputs) for unit in size.units]
    assert outside == 0 and all(layers)  # linear layers alone have outputs, and they are 8 bits here
    assert 0.1 < found.weights / parts.weights < 0.9
    deeper = _of_layers(parts, replace(size, units=(size.units[0], *size.units[1:] * 2)))
    assert deeper.weights / (parts.weights - deeper.weights) == pytest.approx(
        2 * found.weights / (parts.weights - found.weights), rel=1e-3
    )
    assert (found.trained, found.optimizer) == (1000, 2000)  # an adapter is in layers


def test_the_most_that_was_held_and_the_most_that_was_in_use():
    device = torch.device("cpu")
    with Peak(device) as peak:
        before = live(device)
        kept = torch.ones(2, 10_000_000)  # 80 MB
        time.sleep(0.05)
        del kept
    assert 80e6 <= peak.live - before < 90e6
    assert live(device) < before + 10e6
    assert peak.bytes > peak.live - before


def test_looking_takes_time_that_is_counted_and_less_where_only_what_is_held_is_asked_for():
    with Peak(torch.device("cpu"), in_use=False) as peak:
        time.sleep(0.1)
    assert peak.live == 0 and peak.bytes > 1e7
    assert 0 < peak.seconds < 0.1


@pytest.mark.parametrize("clock, looking", [(time.process_time, 100), (time.perf_counter, 0)])
def test_the_time_of_a_phase_is_without_that_of_looking(monkeypatch, clock, looking):
    class Looked(Peak):
        def __exit__(self, *error):
            super().__exit__(*error)
            self.seconds = 100.0

    monkeypatch.setattr(measuring, "Peak", Looked)
    watch = measuring.Watch(torch.device("cpu"), clock)
    with watch.phase("load"):
        pass
    assert 0 <= watch.seconds["load"] + looking < 1


@pytest.mark.slow
def test_the_demo_is_measured_whole(data_path):
    found = estimated("demo", "--data_path", data_path, "--max_steps", 4, "--batch_size", 8, "--device", "cpu")
    assert found["memory"]["basis"] == "measured here on all 5 layers"
    assert found["seconds"]["training"] > 0
    assert found["memory"]["peak"] > found["memory"]["libraries"] > 1e8
    assert (demo_base() / "config.json").is_file()


# ------------------------------------------------------------------------------------------------------- documents


def test_the_table_of_costs_is_current():
    script = runpy.run_path(str(ROOT / "docs" / "cost_table.py"))
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    for name in ("t4", "h200"):
        assert script["row"](name) in page, "run python docs/cost_table.py"
    assert all(f"| {device.name} |" in page for device in TABLE.values())
