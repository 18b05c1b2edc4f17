"""The self-test: its table, its verdict, what it leaves, and some of the faults that it finds (all: make selftest)."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from command import refused, run
from injection import FAULTS, OTHERS, inject, selftest
from transformers import AutoModelForCausalLM, Qwen3Config

from lora_alpaca.config.selftest import CHECKS as NAMES
from lora_alpaca.errors import ModelError
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.selftest import checks, tested_base
from lora_alpaca.selftest.checks import CHECKS, Check, Result, make
from lora_alpaca.selftest.finding import Finding, NotApplicable
from lora_alpaca.selftest.table import Table

QUICK = ("missing end token", "labels of another chunk", "mean of means", "template with one space more")


def raising(error):
    def measure(bench):
        raise error

    return measure


@pytest.mark.parametrize(
    ("measure", "status", "note"),
    [
        (lambda bench: Finding(1e-6, 1e-4), "ok", ""),
        (lambda bench: Finding(1e-4, 1e-4), "ok", ""),
        (lambda bench: Finding(2e-4, 1e-4, "why"), "failed", "why"),
        (lambda bench: Finding(float("nan"), 1e-4), "failed", ""),
        (raising(NotApplicable("no such device")), "left out", "no such device"),
        (raising(ModelError("it does not load")), "failed", "it does not load"),
        (raising(KeyError("of a library\n that is other")), "failed", "KeyError: 'of a library\\n that is other'"),
    ],
)
def test_what_becomes_of_a_check(measure, status, note, monkeypatch):
    monkeypatch.setitem(CHECKS, "labels", Check("", "", measure))
    result = make("labels", bench=None)
    assert (result.status, result.note) == (status, note)


def test_a_signal_ends_the_self_test(monkeypatch):
    monkeypatch.setitem(CHECKS, "labels", Check("", "", raising(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        make("labels", bench=None)


def test_every_check_has_its_name_in_the_options():
    assert tuple(CHECKS) == NAMES


def test_every_check_has_a_fault_that_it_finds():
    assert {fault.check for fault in (FAULTS | OTHERS).values()} == set(NAMES)
    assert len(FAULTS) == 12


def test_a_model_that_cannot_take_packs_is_told_and_not_failed(tmp_path):
    class Bench:
        base, examples = locate_base("demo"), []

        def gradient(self, name, **changes):
            raise ModelError("--engine packed: this model cannot take packs: it has a window; leave the flag out")

    assert make("packing", Bench()).status == "failed"  # the demo model can
    Bench.base = replace(Bench.base, name="another")
    result = make("packing", Bench())
    assert result.status == "left out"
    assert "it has a window" in result.note


def test_a_small_base_is_tested_as_it_is(tmp_path):
    base = locate_base("demo")
    assert tested_base.tested(base, tmp_path / "base") == (base, "demo")
    assert not (tmp_path / "base").exists()


def test_of_a_large_base_the_first_layers_are_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(tested_base, "LARGE", 0)
    base = locate_base("demo")
    found, what = tested_base.tested(base, tmp_path / "base")
    assert what == "the first 2 of 5 layers of demo"
    model, whole = (AutoModelForCausalLM.from_pretrained(one.path).state_dict() for one in (found, locate_base("demo")))
    assert {name.split(".")[2] for name in model if ".layers." in name} == {"0", "1"}
    assert all(torch.equal(model[name], whole[name]) for name in model)
    assert load_tokenizer(found)[0]("An alpaca")["input_ids"] == load_tokenizer(base)[0]("An alpaca")["input_ids"]


def test_what_a_config_lists_for_every_layer_is_cut():
    config = Qwen3Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=1)
    tested_base._cut(config, 2)
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.num_hidden_layers == 2


def test_dropout_of_the_base_itself_is_turned_off(tiny_model, tmp_path):
    base = locate_base(str(tiny_model("GPT2")))
    found, what = tested_base.tested(base, tmp_path / "base")
    assert what == f"{base.name} without its own dropout"
    assert base.config.resid_pdrop == 0.1
    assert {found.config.resid_pdrop, found.config.attn_pdrop, found.config.embd_pdrop} == {0.0}


def test_a_base_that_is_stored_quantised(tiny_llama, tmp_path):
    base = locate_base(str(tiny_llama))
    base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ModelError, match=r"is stored quantised .* name the model that it was quantised from"):
        tested_base.tested(base, tmp_path / "base")


def test_a_check_that_is_not_there():
    assert "--only lables: not one of labels, end_token" in refused("selftest", "--only", "lables")


def test_under_torchrun(monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert "run it without torchrun" in refused("selftest")


RESULTS = [
    Result("labels", "ok", 0, 0, "", 1.0),
    Result("merge", "failed", float("inf"), 1e-5, "it is \x1b[31mred", 2.0),
    Result("ranks", "left out", None, None, "no gloo", 3.0),
]
FACTS = {"base_model": "demo", "precision": "fp32", "threads": 2, "versions": {"torch": "2"}}


def test_the_table(capsys):
    table = Table(["labels", "merge", "ranks"], as_json=False)
    table.head(FACTS)
    for result in RESULTS:
        with table.under_way(result.name):
            pass
        table.add(result)
    table.end(FACTS, RESULTS, 6.0)
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert err == ""
    assert "failed    merge                 inf   1.0e-05   2.0 s" in out
    assert "          no gloo\n" in out
    assert "1 of 3 checks passed, 1 failed, 1 left out, in 6 s" in out


def test_the_json(capsys):
    table = Table(["labels", "merge", "ranks"], as_json=True)
    table.head(FACTS)
    with table.under_way("merge"):
        pass
    table.add(RESULTS[1])
    table.end(FACTS, RESULTS, 6.0)
    out, err = capsys.readouterr()
    whole = json.loads(out, parse_constant=lambda constant: pytest.fail(constant))
    assert err.startswith("2/3 merge: ")
    assert (whole["passed"], whole["base_model"]) == (False, "demo")
    assert [check["measured"] for check in whole["checks"]] == [0, None, None]
    assert whole["checks"][1]["promise"] == CHECKS["merge"].promise


def test_some_checks_in_this_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("selftest", "--only", "labels,end_token,chunked_loss", "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    assert "3 of 3 checks passed" in result.out
    assert os.listdir(tmp_path) == []


def test_a_failure_is_one_line_and_exit_code_1(monkeypatch):
    monkeypatch.setitem(checks.CHECKS, "labels", Check("", "", lambda bench: Finding(3, 0)))
    result = run("selftest", "--only", "labels", "--device", "cpu")
    assert (result.code, result.err) == (1, "error: 1 of 1 checks failed: labels\n")


@pytest.mark.slow
def test_all_checks_pass_and_leave_nothing(tmp_path):
    """With a home, a working and a temporary folder of its own, all of which are empty afterwards."""
    places = {"HOME": "home", "XDG_CACHE_HOME": "home/cache", "TMPDIR": "temporary"}
    for name in ("home/cache", "temporary", "here"):
        (tmp_path / name).mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "lora_alpaca", "selftest", "--json", "--device", "cpu"],
        cwd=tmp_path / "here",
        env=os.environ | {name: str(tmp_path / place) for name, place in places.items()} | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]} == dict.fromkeys(NAMES, "ok")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cache", "here", "home", "temporary"]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_found(name, tmp_path):
    fault = (FAULTS | OTHERS)[name]
    inject(fault, tmp_path)
    done = selftest(tmp_path, "--only", fault.check, "--device", "cpu")
    assert (done.returncode, done.stderr.strip()) == (1, f"error: 1 of 1 checks failed: {fault.check}")
    assert f"failed    {fault.check}" in done.stdout
