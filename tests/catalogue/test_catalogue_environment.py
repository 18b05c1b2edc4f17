"""The catalogue of bad inputs, environment (D): devices, memory, the hub, libraries and trackers.

The whole command line runs, in this process; what is missing or broken is put in its place.
"""

import importlib.metadata
import importlib.util
import logging
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import psutil
import pytest
import torch
from command import run
from entries import ASK, SHORT, cases, entry, line_of

from lora_alpaca.config import GenerateConfig
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec, choose_device
from lora_alpaca.models.meta import memory_bytes, meta_model
from lora_alpaca.training.trackers import usable_tracker

pytestmark = pytest.mark.usefixtures("here")  # an empty folder, where nothing may be written and no model loaded


@entry("D81")
def test_few_bits_on_a_cpu_are_slow_and_that_is_said(number):
    for options in ({"load_8bit": True}, {"load_4bit": True}):
        said = choose_device(GenerateConfig(device="cpu", **options))[1]
        assert said == ["no GPU is used: a quantised base works on a CPU, and is slow"]
    assert choose_device(GenerateConfig(device="cpu"))[1] == []


@entry("D82")
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("verb", ["finetune", "generate"])
def test_bitsandbytes_that_does_not_import(number, verb, broken, monkeypatch, here, tiny_llama, data_path):
    if broken:
        (here.parent / "bitsandbytes.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
        monkeypatch.syspath_prepend(here.parent)
        monkeypatch.delitem(sys.modules, "bitsandbytes")
    else:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    words = ("--data_path", data_path) if verb == "finetune" else ("--prompt_template", "alpaca", *ASK)
    line = line_of(verb, "--base_model", tiny_llama, "--load_8bit", *words, code=1)
    assert "8-bit (LLM.int8) needs bitsandbytes, which does not import (" in line
    assert line.endswith("; pip install bitsandbytes, or pass --load_8bit False")


@entry("D83")
@pytest.mark.parametrize(
    ("device", "asked", "dtype", "sentences"),
    [
        ("cuda", "bf16", torch.float16, ["bf16 is not native on cuda: fp16 is used"]),
        ("cpu", "bf16", torch.float32, ["bf16 is not native on cpu: fp32 is used"]),
        ("cuda", "auto", torch.float16, []),
        ("cpu", "auto", torch.float32, []),
    ],
)
def test_bf16_that_is_not_native(number, monkeypatch, device, asked, dtype, sentences):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": False})
    spec, said = choose_device(GenerateConfig(dtype=asked), torch.device(device))
    assert (spec.dtype, said) == (dtype, sentences)
    assert {torch.float16: "fp16", torch.float32: "fp32"}[dtype] in str(spec)  # which a run says, in any case


@entry("D85")
@pytest.mark.parametrize("verb", ["finetune", "generate"])
def test_a_base_that_is_larger_than_the_memory(number, verb, monkeypatch, tiny_llama, data_path):
    class Little:
        available = total = free = 50_000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    monkeypatch.setattr(psutil, "swap_memory", Little)
    words = ("--data_path", data_path, *SHORT) if verb == "finetune" else ("--prompt_template", "alpaca", *ASK)
    line = line_of(verb, "--base_model", tiny_llama, "--dtype", "fp32", *words, code=1)
    assert "as unquantised base, fp32 compute on cpu" in line
    assert "0.000 GB are free" in line
    assert "; take a smaller model" in line
    assert ("(weights 0.001 GB, " if verb == "finetune" else "its weights take 0.001 GB as") in line


@entry("D85")
@pytest.mark.parametrize(("bits", "scales"), [(16, 0), (8, 0.04), (4, 0.05)])
def test_the_estimate_is_what_the_weights_take(number, bits, scales, tiny_model, model_loads):
    """Of bitsandbytes' layers, with their scales, which are no parameters; the rest is held as it is computed."""
    for architecture in ("Llama", "GPT2"):
        base = locate_base(str(tiny_model(architecture)))
        spec = DeviceSpec(torch.device("cpu"), torch.float32, bits)
        loaded, _ = load_base(base, spec)
        taken = sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters())
        estimate = memory_bytes(meta_model(base), spec)
        assert taken <= estimate <= taken * (1 + scales)


@entry("D85")
def test_the_estimate_of_a_run_is_printed_before_it_starts(number, tiny_llama, data_path, model_loads):
    result = run("finetune", "--base_model", tiny_llama, "--data_path", data_path, *SHORT, "--dtype", "fp32")
    lines = result.out.splitlines()
    told = next(place for place, line in enumerate(lines) if line == f"the weights of {tiny_llama} take about 0.001 GB")
    assert told < next(place for place, line in enumerate(lines) if line.startswith("base: "))


@entry("D89")
def test_an_output_folder_that_is_a_file(number, here, tiny_llama, data_path):
    (here / "out").write_text("mine")
    words = ("--base_model", tiny_llama, "--data_path", data_path, "--output_dir", "out")
    assert "--output_dir out is not a folder; name another folder" in line_of("finetune", *words)
    assert (here / "out").read_text() == "mine"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_the_hub_cache(folder, source, *left_out):
    """Lay a model into a cache as huggingface_hub leaves it when it is interrupted."""
    snapshot = folder / "models--someone--tiny" / "snapshots" / COMMIT
    shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns(*left_out))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


HALVES = [
    ("D92", ["model.safetensors"], "holds no weights (model.safetensors is missing); copy or download the model again"),
    ("D92", ["tokenizer*"], "the tokenizer of "),
    ("D92", ["tokenizer.json", "tokenizer.model"], "tokenizer.json is missing, and so are tokenizer.model and vo"),
    ("D92", ["config.json"], "error: --base_model someone/tiny: no folder of this name here, and the hub gives none"),
]


@cases(HALVES, "left_out, said")
def test_a_base_of_which_the_cache_holds_only_half(left_out, said, hub_cache, tiny_llama, data_path):
    in_the_hub_cache(hub_cache, tiny_llama, *left_out)
    words = ("--base_model", "someone/tiny", "--data_path", data_path, *SHORT)
    assert said in line_of("finetune", *words, code=1)


class Answers(BaseHTTPRequestHandler):
    """A hub; a repository's name says with which status it answers: someone/s404."""

    said: ClassVar = {
        401: {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
        403: {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted; ask for it"},
        404: {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
        200: {"X-Repo-Commit": COMMIT, "ETag": '"0"', "Content-Length": "2"},
    }

    def do_HEAD(self):
        status = int(self.path.split("/")[2][1:])
        self.send_response(status)
        for name, value in self.said.get(status, {}).items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(b"{}")

    def log_message(self, *words):
        pass


def address(monkeypatch, port):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    files = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)


@pytest.fixture
def hub(hub_cache, monkeypatch):
    """Let the library ask a hub on this machine, without a pause before it asks again."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    address(monkeypatch, server.server_port)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


@entry("D92")
def test_a_hub_cache_that_cannot_be_written_to(number, here, hub, monkeypatch, data_path):
    (here.parent / "file").write_text("x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here.parent / "file" / "hub"))
    line = line_of("finetune", "--base_model", "someone/s200", "--data_path", data_path, code=1)
    assert line.startswith("error: --base_model someone/s200: ")
    assert f"{here.parent / 'file'}" in line


@entry("D93")
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "is not a valid model identifier"),
        (403, "You are trying to access a gated repo"),
        (404, "is not a valid model identifier"),
        (429, "because Client error '429 Too Many Requests'"),
        (500, "because Server error '500 Internal Server Error'"),
        ("nobody", "Connection refused"),
    ],
)
def test_a_hub_that_refuses_is_told_in_a_line_that_names_what_was_asked_for(
    number, status, reason, hub, monkeypatch, data_path
):
    if status == "nobody":
        address(monkeypatch, 9)  # where nobody listens
    name = f"someone/s{status}"
    line = line_of("finetune", "--base_model", name, "--data_path", data_path, code=1)
    assert line.startswith(f"error: --base_model {name}: no folder of this name here, and the hub gives none: ")
    assert reason in line
    assert logging.getLogger("huggingface_hub").level == logging.ERROR  # else it writes a line for every try


@entry("D94")
def test_a_tracker_that_is_missing_or_not_logged_in_is_a_warning(number, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = "warning: --report_to wandb: not installed (pip install wandb); going on without it"
    assert usable_tracker("wandb") == (None, line)

    class Wandb:
        login = staticmethod(lambda prompt: False)

        class setup:
            class settings:
                mode = "online"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    line = "warning: --report_to wandb: not logged in (wandb login); going on without it"
    assert usable_tracker("wandb") == (None, line)


@entry("D97")
@pytest.mark.parametrize("verb", ["finetune", "generate", "export", "show", "convert_adapter", "convert_base"])
def test_libraries_of_other_versions(number, verb, monkeypatch):
    there = {"torch": "2.9.1+cu126", "peft": "1.0rc1", "transformers": "5.23.1"}
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: there.get(name) or version(name))
    line = line_of(verb, *(("old", "new") if verb.startswith("convert") else ()), code=1)
    assert "torch 2.9.1+cu126 is installed, and torch>=2.13,<3 is needed" in line
    assert "peft 1.0rc1 is installed, and peft>=0.21,<1 is needed" in line
    assert "transformers" not in line
    assert line.endswith("pip install -r requirements.txt puts in what was tested")


@entry("D97")
def test_a_library_that_is_missing(number, monkeypatch):
    version = importlib.metadata.version

    def without(name):
        if name in ("datasets", "bitsandbytes"):  # the latter is told where it is needed
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert line_of("export", code=1).startswith("error: datasets is not installed: pip install ")
