"""The catalogue of bad inputs, flags (C), environment (D) and folders (F): each is refused in one line, in time.

What is refused goes through the command line, in this process; no model may be loaded before, and nothing written.
"""

import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, get_args

import psutil
import pytest
import torch
import transformers
from catalogue import Entries
from command import run
from conftest import as_row
from faults import programme
from safetensors.torch import load_file, save_file

from lora_alpaca import checkpoints, exporting, models, skeletons, storage
from lora_alpaca.cli import parse
from lora_alpaca.config import FinetuneConfig, GenerateConfig
from lora_alpaca.reports import usable_tracker

ENTRIES = Entries()
entry, cases = ENTRIES.entry, ENTRIES.cases


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Go to an empty folder, where nothing may appear, and return it."""
    monkeypatch.setattr("lora_alpaca.models.load_base", lambda *_: pytest.fail("the model was loaded first"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model_loads(monkeypatch):
    """Let models be loaded, for entries that are no refusal."""
    monkeypatch.setattr("lora_alpaca.models.load_base", LOAD_BASE)


LOAD_BASE = models.load_base
SHORT = ("--max_steps", 1, "--batch_size", 2, "--val_set_size", 2, "--cutoff_len", 96, "--load_8bit", "False")
ASK = ("--instruction", "Hello.", "--max_new_tokens", 2, "--temperature", 0)


def line_of(verb, *words, code=2):
    """Return the one line that refuses a command, with its exit code, having written nothing."""
    before = sorted(Path().rglob("*"))
    result = run(verb, *words)
    assert result.code == code, result
    lines = [line for line in result.err.splitlines() if not line.startswith(("adapter ", "model ", "warning: "))]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert sorted(Path().rglob("*")) == before
    return lines[0]


def launched(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# ---------------------------------------------------------------------------------------------------------- C. flags

BAD_FLAGS = [
    ("C58", ["--learnig_rate", "1e-5"], "unknown flag --learnig_rate; did you mean --learning_rate?"),
    ("C58", ["--lora_rank=4"], "unknown flag --lora_rank; did you mean --lora_"),
    ("C58", ["--fp16"], "unknown flag --fp16"),
    ("C59", ["extra"], "stray word 'extra'; every option is --name value"),
    ("C59", ["--seed", "1", "data.json"], "stray word 'data.json'"),
    ("C60", ["--num_epochs"], "--num_epochs needs a value: --num_epochs NUMBER"),
    ("C60", ["--base_model", "--resume"], "--base_model needs a value: --base_model TEXT"),
    ("C61", ["--load_8bit", "maybe"], "--load_8bit maybe: input should be a valid boolean"),
    ("C63", ["--learning_rate", "abc"], "--learning_rate abc: input should be a valid number"),
    ("C63", ["--learning_rate", "nan"], "--learning_rate nan: input should be a finite number"),
    ("C63", ["--learning_rate", "inf"], "--learning_rate inf: input should be a finite number"),
    ("C63", ["--learning_rate", "0"], "--learning_rate 0: input should be greater than 0"),
    ("C63", ["--learning_rate", "-1e-4"], "--learning_rate -1e-4: input should be greater than 0"),
    ("C63", ["--learning_rate", "3e4"], "--learning_rate 3e4: input should be less than or equal to 1"),
    ("C64", ["--seed", "1", "--seed", "2"], "--seed is given twice; once is enough"),
    ("C65", ["--batch_size", "10", "--micro_batch_size", "4"], "no multiple of --micro_batch_size 4; nearest: 8 or 12"),
    ("C66", ["--batch_size", "2", "--micro_batch_size", "4"], "no multiple of --micro_batch_size 4; nearest: 4"),
    ("C68", ["--cutoff_len", "0"], "--cutoff_len 0: input should be greater than or equal to 2"),
    ("C68", ["--cutoff_len", "1"], "--cutoff_len 1: input should be greater than or equal to 2"),
    ("C69", ["--lora_r", "0"], "--lora_r 0: input should be greater than or equal to 1"),
    ("C69", ["--lora_r", "-1"], "--lora_r -1: input should be greater than or equal to 1"),
    ("C70", ["--lora_alpha", "0"], "--lora_alpha 0: input should be greater than 0"),
    ("C72", ["--lora_target_modules", "[]"], "--lora_target_modules"),
    ("C73", ["--lora_dropout", "1.5"], "--lora_dropout 1.5: input should be less than 1"),
    ("C73", ["--lora_dropout", "1.0"], "--lora_dropout 1.0: input should be less than 1"),
    ("C73", ["--lora_dropout", "nan"], "--lora_dropout nan: input should be a finite number"),
    ("C74", ["--num_epochs", "0"], "--num_epochs 0: input should be greater than 0"),
    ("C74", ["--max_steps", "0"], "--max_steps 0: input should be greater than or equal to 1"),
    ("C75", ["--seed", "-1"], "--seed -1: input should be greater than or equal to 0"),
    ("C75", ["--seed", "99999999999999999999"], "--seed 99999999999999999999: input should be less than 4294967296"),
    ("C76", ["--load_8bit", "--load_4bit"], "--load_8bit and --load_4bit exclude each other; choose one"),
    ("C76", ["--dtype", "fp16,bf16"], "--dtype fp16,bf16: input should be 'auto', 'bf16', 'fp16' or 'fp32'"),
    ("C77", ["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere: no such folder"),
]


@cases(BAD_FLAGS, "words, said")
def test_a_bad_flag_is_refused(words, said):
    assert said in line_of("finetune", *words)


@entry("C61")
def test_words_for_false_are_false(number):
    for word in ("false", "False", "no", "0", "off"):
        assert parse(FinetuneConfig, ["--load_8bit", word]).load_8bit is False


@entry("C62")
@pytest.mark.parametrize("name", ["123", "1e5", "[a", "{'a': 1}", "None"])
def test_a_name_stays_as_it_was_typed(number, name, data_path):
    assert parse(FinetuneConfig, ["--base_model", name]).base_model == name
    line = line_of("finetune", "--base_model", name, "--data_path", data_path, code=1)
    assert line.startswith(f"error: --base_model {name}: no folder of this name here, and the hub gives none: ")


WHOLE = [
    (config_class, name)
    for config_class in (FinetuneConfig, GenerateConfig)
    for name, field in config_class.model_fields.items()
    if field.annotation is int or int in get_args(field.annotation)
]


@entry("C67")
@pytest.mark.parametrize(("config_class", "name"), WHOLE, ids=[name for _, name in WHOLE])
def test_a_whole_number_is_one_and_not_too_small(number, config_class, name):
    verb = "finetune" if config_class is FinetuneConfig else "generate"
    for value in ("-1", "2.5", "many", *(() if name in ("warmup_steps", "seed", "top_k") else ("0",))):
        assert f"--{name} {value}: input should be " in line_of(verb, f"--{name}", value)


@entry("C68")
def test_rows_longer_than_the_model_takes(number, tiny_llama, data_path):
    words = ("--base_model", tiny_llama, "--data_path", data_path, "--load_8bit", "False")
    line = line_of("finetune", *words, "--cutoff_len", 513)
    assert line == f"error: --cutoff_len 513: {tiny_llama} takes at most 512 tokens"


ODD = [
    ("C63", ["--learning_rate", "0.5"], "warning: --learning_rate 0.5 is very high; LoRA is trained with about 3e-4"),
    ("C70", ["--lora_r", "65"], "warning: --lora_r 65 is more than the model is wide (64), which gains nothing"),
]


@cases(ODD, "words, said")
def test_what_is_odd_is_warned_about(words, said, tiny_llama, data_path, model_loads):
    result = run("finetune", "--base_model", tiny_llama, "--data_path", data_path, *SHORT, *words)
    assert result.code == 0, result.err
    assert said in result.out.splitlines()


TARGETS = [
    (
        "C71",
        "qq_proj",
        "--lora_target_modules qq_proj: the model has no such module; it has down_proj, gate_proj",
    ),
    ("C71", "q_proj,value", "--lora_target_modules value: the model has no such module; it has down_proj, gate_proj"),
    ("C72", "q_proj v_proj", "--lora_target_modules q_proj v_proj: the model has no such module"),
    ("C72", ".*_proj", "--lora_target_modules .*_proj: the model has no such module"),
]


@cases(TARGETS, "names, said")
def test_target_modules_that_are_not_there(names, said, tiny_llama, data_path):
    words = ("--base_model", tiny_llama, "--data_path", data_path, *SHORT)
    assert said in line_of("finetune", *words, "--lora_target_modules", names, code=1)


@entry("C72")
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("['q_proj','v_proj']", ["q_proj", "v_proj"]),
        ("all-linear", ["all-linear"]),
    ],
    ids=["plain", "in brackets", "quoted", "all"],
)
def test_a_list_is_read_as_one(number, typed, meant):
    assert parse(FinetuneConfig, ["--lora_target_modules", typed]).lora_target_modules == meant


@entry("C77")
def test_resuming_from_what_is_no_checkpoint(number, here):
    (here / "folder").mkdir()
    assert line_of("finetune", "--resume_from_checkpoint", "folder").startswith(
        "error: --resume_from_checkpoint folder: holds no checkpoint"
    )


ALONE = [
    ("C79", {"WORLD_SIZE": "2"}, "2 processes were launched, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
    (
        "C79",
        {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"},
        "but MASTER_ADDR, MASTER_PORT not set; start with",
    ),
    ("C79", {"LOCAL_RANK": "0"}, "but RANK, MASTER_ADDR, MASTER_PORT not set"),
    ("C79", {"WORLD_SIZE": "two"}, "the variable WORLD_SIZE is 'two', no number of processes"),
    ("C79", {"WORLD_SIZE": "0"}, "the variable WORLD_SIZE is '0', no number of processes"),
]


@cases(ALONE, "variables, said")
def test_variables_of_a_launcher_that_is_not_there(variables, said, monkeypatch):
    launched(monkeypatch, **variables)
    assert said in line_of("finetune")


@entry("C79")
def test_a_rank_that_there_cannot_be(number, monkeypatch):
    launched(monkeypatch, WORLD_SIZE="2", RANK="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    assert "the variable RANK is '2', and WORLD_SIZE is 2; start with torchrun" in line_of("finetune")


@entry("C80")
def test_an_output_folder_that_is_the_base_or_holds_the_data(number, here, tiny_llama, data_path):
    base = shutil.copytree(tiny_llama, here / "base")
    shutil.copy(data_path, here / "rows.json")
    (here / "data").mkdir()
    shutil.copy(data_path, here / "data" / "rows.json")
    for out, words in {
        "base": ("--base_model", base),
        "./data/../base/": ("--base_model", "base"),
        "rows.json": ("--data_path", "rows.json"),
        "data": ("--data_path", "data/rows.json"),
        "data/": ("--data_path", "rows.json,data/rows.json"),
    }.items():
        assert f"--output_dir {out} is, or holds, {words[0]} " in line_of("finetune", *words, "--output_dir", out)


# ---------------------------------------------------------------------------------------------------- D. environment


@entry("D81")
def test_few_bits_on_a_cpu_are_slow_and_that_is_said(number):
    for options in ({"load_8bit": True}, {"load_4bit": True}):
        placement, said = models.place(GenerateConfig(device="cpu", **options))
        assert said == [f"no GPU is used: a base in {placement.bits} bits works on a CPU, and is slow"]
    assert models.place(GenerateConfig(device="cpu"))[1] == []


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
    monkeypatch.setattr(models, "has_bf16", lambda _: False)
    placement, said = models.place(GenerateConfig(dtype=asked), torch.device(device))
    assert (placement.dtype, said) == (dtype, sentences)
    assert {torch.float16: "fp16", torch.float32: "fp32"}[dtype] in str(placement)  # which a run says, in any case


@entry("D85")
@pytest.mark.parametrize("verb", ["finetune", "generate"])
def test_a_base_that_is_larger_than_the_memory(number, verb, monkeypatch, tiny_llama, data_path):
    class Little:
        available = total = free = 50_000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    monkeypatch.setattr(psutil, "swap_memory", Little)
    words = ("--data_path", data_path, *SHORT) if verb == "finetune" else ("--prompt_template", "alpaca", *ASK)
    line = line_of(verb, "--base_model", tiny_llama, "--dtype", "fp32", *words, code=1)
    assert "its weights take 0.001 GB as unquantised base, fp32 compute on cpu, and 0.000 GB are free; take a" in line
    assert "--load_4bit" in line


@entry("D85")
@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-9), (8, 0.02), (4, 0.05)])
def test_the_estimate_is_what_the_weights_take(number, bits, tolerance, tiny_model):
    """Of bitsandbytes' layers, with their scales; the rest is held as it is computed."""
    for architecture in ("Llama", "GPT2"):
        base = models.locate_base(str(tiny_model(architecture)))
        placement = models.Placement(torch.device("cpu"), torch.float32, bits)
        loaded = LOAD_BASE(base, placement)
        taken = sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters())
        estimate = skeletons.memory_bytes(skeletons.skeleton(base), placement)
        assert taken <= estimate * (1 + 1e-9)
        assert estimate <= taken * (1 + tolerance)


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
@pytest.mark.parametrize("verb", ["finetune", "generate", "export", "show", "convert_adapter"])
def test_libraries_of_other_versions(number, verb, monkeypatch):
    there = {"torch": "2.9.1+cu126", "peft": "1.0rc1", "transformers": "5.23.1"}
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: there.get(name) or version(name))
    line = line_of(verb, *(("old", "new") if verb == "convert_adapter" else ()), code=1)
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


# -------------------------------------------------------------------------------------------- F. models and adapters


def without(*patterns):
    """Return a kind of damage: files missing from a model's folder."""

    def change(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def bytes_of(name, change):
    """Return a kind of damage: the bytes of a file changed."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def described(**changes):
    """Return a kind of damage: a config.json that says something else."""

    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return change


def in_shards(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")


def a_broken_index(folder):
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def a_shard_missing(folder):
    in_shards(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def as_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def of_class(name, **sizes):
    def change(folder):
        (folder / "config.json").write_text(getattr(transformers, name)(**sizes).to_json_string())

    return change


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NO_WRITER = "does not write on from a text; name a causal language model, such as a Llama, Mistral, Qwen or GPT"
BAD_BASES = [
    (
        "F107",
        without("tokenizer*"),
        "the tokenizer of {base}: tokenizer.json is missing, and so are tokenizer.model",
    ),
    (
        "F107",
        without("tokenizer.json", "tokenizer.model"),
        "the tokenizer of {base}: tokenizer.json is missing, and so",
    ),
    ("F108", without("model.safetensors"), "{base} holds no weights (model.safetensors is missing)"),
    ("F108", bytes_of("model.safetensors", lambda data: b""), "{base}/model.safetensors is empty (0 bytes)"),
    ("F108", bytes_of("model.safetensors", lambda data: POINTER), "{base}/model.safetensors is a git-LFS pointer, not"),
    ("F108", bytes_of("model.safetensors", lambda data: data[:-9]), "{base}/model.safetensors cannot be read ("),
    ("F108", bytes_of("model.safetensors", lambda data: b"\xff" * 99), "{base}/model.safetensors cannot be read ("),
    ("F108", a_shard_missing, "model-00002-of-"),
    (
        "F108",
        lambda folder: (in_shards(folder), (folder / "model.safetensors.index.json").write_text("{")),
        "index.json",
    ),
    ("F110", of_class("BertConfig"), f"a bert model {NO_WRITER}"),
    ("F110", of_class("T5Config"), f"a t5 model {NO_WRITER}"),
    ("F110", of_class("ViTConfig"), f"a vit model {NO_WRITER}"),
    ("F110", described(model_type="zork"), "model type `zork` but Transformers does not recognize this architecture"),
    ("F110", described(num_hidden_layers="two"), "Field 'num_hidden_layers' expected int, got str (value: 'two')"),
    ("F110", bytes_of("config.json", lambda data: data[:20]), "config.json' is not a valid JSON file"),
    (
        "F114",
        as_a_pickle,
        "{base} holds pytorch_model.bin, a pickle, which is not loaded, and no model.safetensors",
    ),
]


@cases(BAD_BASES, "change, said")
def test_a_bad_base_is_refused(change, said, here, tiny_llama, data_path):
    base = shutil.copytree(tiny_llama, here / "base")
    change(base)
    training = ("--base_model", base, "--data_path", data_path, *SHORT)
    for verb, words in {
        "finetune": training,
        "generate": ("--base_model", base, "--prompt_template", "alpaca", *ASK),
    }.items():
        assert said.format(base=base) in line_of(verb, *words, code=1)


HALF_LOADED = [
    ("F108", lambda state: dict(sorted(state.items())[:-2]), "is missing or of another shape (2 in all)"),
    ("F110", lambda state: state | {"model.norm.weight": torch.ones(7)}, "is missing or of another shape (1 in all)"),
]


@cases(HALF_LOADED, "change, said")
def test_a_base_whose_files_do_not_hold_all_of_it(change, said, here, tiny_llama, data_path, model_loads):
    base = shutil.copytree(tiny_llama, here / "base")
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors", metadata={"format": "pt"})
    line = line_of("finetune", "--base_model", base, "--data_path", data_path, *SHORT, code=1)
    assert said in line


@entry("F108")
def test_weights_without_a_place_in_the_model_are_told(number, here, tiny_llama, model_loads):
    base = shutil.copytree(tiny_llama, here / "base")
    state = load_file(base / "model.safetensors") | {"model.layers.9.mlp.gate_proj.weight": torch.ones(7)}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    result = run("generate", "--base_model", base, "--prompt_template", "alpaca", *ASK)
    assert result.code == 0, result.err
    line = "1 weights of its files have no place in the model, such as model.layers.9.mlp.gate_proj.weight"
    assert f"warning: --base_model {base}: {line}" in result.err.splitlines()
    assert "LOAD REPORT" not in result.err


@pytest.fixture(scope="module")
def trained(tiny_llama, rows, tmp_path_factory):
    """Return the folder of an adapter that was trained for three steps, with two checkpoints in it."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "rows.json"
    path.write_text(json.dumps([as_row(conversation) for conversation in rows]))
    result = run("finetune", *training(tiny_llama, path), "--output_dir", folder / "out")
    assert result.code == 0, result.err
    return folder / "out"


def training(base, rows):
    """Return the words of a short run with two checkpoints."""
    return ("--base_model", base, "--data_path", rows, *SHORT[2:], "--max_steps", 3, "--save_steps", 1)


@pytest.fixture
def adapter(trained, here):
    """Return a copy of the adapter, to be damaged."""
    return shutil.copytree(trained, here / "adapter")


@pytest.fixture
def begun(trained, adapter, tiny_llama):
    """Return a run that was killed after its second checkpoint, and the words that it was begun with."""
    record = json.loads((adapter / "lora_alpaca.json").read_text())
    (adapter / "lora_alpaca.json").write_text(json.dumps(record | {"status": "running"}))
    return adapter, (*training(tiny_llama, trained.parent / "rows.json"), "--output_dir", adapter)


@entry("C78")
def test_going_on_with_other_options(number, begun):
    _, words = begun
    line = line_of("finetune", *words, "--resume", "--learning_rate", "1e-5", "--lora_dropout", "0.2", code=1)
    assert "learning_rate was 0.0003 and is 1e-05; lora_dropout was 0.05 and is 0.2" in line
    assert "allow the change with --allow_change learning_rate,lora_dropout" in line


@entry("D86")
def test_a_disk_that_is_too_small_for_the_run(number, tiny_llama, data_path, model_loads, monkeypatch):
    class Full:
        free = 10_000

    monkeypatch.setattr("lora_alpaca.folders.shutil.disk_usage", lambda path: Full)
    words = ("--base_model", tiny_llama, "--data_path", data_path, *SHORT, "--output_dir", "out")
    line = line_of("finetune", *words)
    assert "--output_dir out: the run writes about 0 MB and the disk has 0 MB left; free some, lower --save_to" in line


@entry("D88")
@pytest.mark.parametrize("verb", ["finetune", "export"])
def test_a_folder_that_must_not_be_written_to(number, verb, adapter, tiny_llama, data_path, monkeypatch, here):
    monkeypatch.setattr("lora_alpaca.folders.os.access", lambda path, mode: False)  # for a superuser there is none
    training = ("--base_model", tiny_llama, "--data_path", data_path, *SHORT)
    words = training if verb == "finetune" else ("--lora_weights", adapter)
    line = line_of(verb, *words, "--output_dir", "new/out")
    assert line == f"error: --output_dir new/out: {here} is not writable; name another folder"


@entry("D90")
def test_a_folder_with_the_checkpoints_of_another_run(number, begun, here, tiny_llama, data_path):
    folder, words = begun
    line = line_of("finetune", *words)
    assert f"--output_dir {folder} holds an unfinished run; go on with --resume, or start anew with --overwrite" in line
    (here / "theirs" / "checkpoint-1000").mkdir(parents=True)
    (here / "theirs" / "checkpoint-1000" / "trainer_state.json").write_text("{}")
    for way in ((), ("--overwrite",), ("--resume",)):
        words = ("--base_model", tiny_llama, "--data_path", data_path, *SHORT, "--output_dir", "theirs", *way)
        line = line_of("finetune", *words)
        assert "is not empty and was not made by lora_alpaca; name another folder" in line


@entry("D91")
@pytest.mark.parametrize("way", ["--resume", "--overwrite"])
def test_a_folder_that_another_run_is_at_work_in(number, way, begun, model_loads):
    folder, words = begun
    with storage.locked(folder):
        line = line_of("finetune", *words, way)
    assert f"--output_dir {folder}: " in line
    assert f"process {os.getpid()} on {socket.gethostname()}" in line


@entry("D95")
def test_checkpoints_are_ordered_by_their_steps_not_by_the_clock(number, begun):
    folder, _ = begun
    os.utime(folder / "checkpoint-2", (0, 0))
    assert checkpoints.newest(folder)[0] == folder / "checkpoint-2"
    checkpoints.rotate(folder, json.loads((folder / "lora_alpaca.json").read_text())["run"], keep=1)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]


def loads(adapter, data_path):
    """Return the words of each command that loads an adapter."""
    return {
        "finetune": ("--init_adapter", adapter, "--data_path", data_path, "--load_8bit", "False"),
        "generate": ("--lora_weights", adapter, *ASK),
        "export": ("--lora_weights", adapter),
    }


@entry("F109")
def test_a_bit_turned_in_an_adapter_or_in_its_base(number, adapter, data_path, here, tiny_llama):
    turn = bytes_of("adapter_model.safetensors", lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
    base = shutil.copytree(tiny_llama, here / "base")
    bytes_of("model.safetensors", lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])(base)
    for verb, words in loads(adapter, data_path).items():
        line = line_of(verb, *words, "--base_model", base, code=1)
        assert f"was trained on {tiny_llama}, and the weights of {base} are others" in line
    turn(adapter)
    for verb, words in loads(adapter, data_path).items():
        line = line_of(verb, *words, "--base_model", tiny_llama, code=1)
        assert "adapter_model.safetensors: not as it was saved (its sha256 is another); copy it again" in line


@entry("F109")
def test_a_bit_turned_in_a_merged_model(number, adapter, data_path, here, model_loads):
    assert run("export", "--lora_weights", adapter, "--output_dir", "merged").code == 0
    commands = {"generate": ASK, "finetune": ("--data_path", data_path, *SHORT)}
    assert run("generate", "--base_model", "./merged", *ASK).code == 0
    bytes_of("model.safetensors", lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])(here / "merged")
    for verb, words in commands.items():
        line = line_of(verb, "--base_model", "./merged", *words, code=1)
        assert "model.safetensors is not as it was exported (its sha256 is another); export it again" in line


@entry("F111")
def test_an_adapter_given_as_a_base_and_a_base_as_an_adapter(number, adapter, data_path, tiny_llama):
    for folder in (adapter, next(adapter.glob("checkpoint-*"))):
        line = line_of("finetune", "--base_model", folder, "--data_path", data_path, code=1)
        assert line.startswith(f"error: --base_model {folder}: an adapter, not a base model")
        line = line_of("generate", "--base_model", folder, "--lora_weights", "none", *ASK, code=1)
        assert line.startswith(f"error: --base_model {folder}: an adapter, not a base model")
    for verb, words in loads(tiny_llama, data_path).items():
        line = line_of(verb, *words, "--base_model", tiny_llama, code=1)
        assert f"{tiny_llama}: no adapter there (it is a model; name it with --base_model)" in line


@entry("F111")
def test_a_checkpoint_given_as_an_adapter_is_one_if_it_is_whole(number, adapter, data_path, tiny_llama, model_loads):
    checkpoint = next(adapter.glob("checkpoint-*"))
    words = ("--lora_weights", checkpoint, "--prompt_template", "alpaca", *ASK)
    assert run("generate", *words).code == 0
    bytes_of("optimizer.safetensors", lambda data: data[:-1])(checkpoint)
    assert "optimizer.safetensors is " in line_of("generate", *words, code=1)


OTHER_BASES = [
    ("F112", "layers", {"num_hidden_layers": 1}, "wrong base model?"),
    ("F112", "width", {"hidden_size": 32}, "the base model needs [8, 32]"),
    ("F112", "vocabulary", {"vocab_size": 999}, "are others; name that base"),
    ("F112", "weights", {}, "are others; name that base"),
]


@cases(OTHER_BASES, "kind, changes, said")
def test_an_adapter_for_another_base(kind, changes, said, adapter, data_path, here, tiny_llama):
    other = shutil.copytree(tiny_llama, here / "other")
    settings = transformers.AutoConfig.from_pretrained(other)
    settings.update(changes)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(other)
    for verb, words in loads(adapter, data_path).items():
        line = line_of(verb, *words, "--base_model", other, code=1)
        assert said in line
        assert str(tiny_llama) in line
        assert str(other) in line


def adapter_state(change):
    """Return a kind of damage: an adapter without a record whose tensors are changed."""

    def damage(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)
        (folder / "lora_alpaca.json").unlink()

    return damage


def adapter_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


BAD_ADAPTERS = [
    ("F113", adapter_state(lambda state: {n: t * float("nan") for n, t in state.items()}), "holds NaN or infinity"),
    ("F113", adapter_state(lambda state: {n: t / 0 for n, t in state.items()}), "holds NaN or infinity"),
    ("F113", adapter_state(lambda state: {}), "holds no tensors; it is an empty adapter"),
    ("F113", adapter_state(lambda state: {n: t * ("lora_A" in n) for n, t in state.items()}), "changes nothing (every"),
    ("F114", adapter_pickle, "a pickle, which is not loaded: lora-alpaca convert_adapter {adapter} NEW"),
]


@cases(BAD_ADAPTERS, "damage, said")
def test_a_bad_adapter_is_refused(damage, said, adapter, data_path, tiny_llama):
    damage(adapter)
    for verb, words in loads(adapter, data_path).items():
        assert said.format(adapter=adapter) in line_of(verb, *words, "--base_model", tiny_llama, code=1)


@entry("F115")
def test_an_export_onto_something_else_or_onto_what_it_is_made_from(number, adapter, here, tiny_llama, monkeypatch):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("mine")
    words = ("--lora_weights", adapter)
    line = line_of("export", *words, "--output_dir", "out", "--overwrite")
    assert "is not empty and was not made by lora_alpaca; name another folder" in line
    line = line_of("export", *words, "--output_dir", adapter, "--overwrite")
    assert line == f"error: --output_dir {adapter} is the folder of --lora_weights; name another folder"
    base = shutil.copytree(tiny_llama, here / "base")
    (base / "lora_alpaca.json").write_text('{"status": "finished", "files": []}')  # an earlier export, as a base
    line = line_of("export", *words, "--output_dir", base, "--base_model", base)
    assert line == f"error: --output_dir {base} is the folder of --base_model; name another folder"


@entry("F115")
def test_an_export_onto_a_disk_that_is_too_small(number, adapter, monkeypatch):
    class Full:
        free = 10_000

    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: Full)
    line = line_of("export", "--lora_weights", adapter, "--output_dir", "out")
    assert line.startswith("error: --output_dir out: the merged model takes 0.001 GB, and 0.000 GB are free on that")


@entry("F116")
def test_a_quantised_base_is_not_merged_into(number, adapter, here, tiny_llama):
    base = shutil.copytree(tiny_llama, here / "base")
    described(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(base)
    line = line_of("export", "--lora_weights", adapter, "--base_model", base, code=1)
    assert "is stored quantised; merging needs full precision: name the model that it was quantised from" in line


# ------------------------------------------------------------------------------------------------------- the whole


def test_every_entry_has_its_test():
    """Here, or, where a run has begun and needs a fault put into it, in a part of tests/faults."""
    parts = {"C": (58, 80), "D": (81, 97), "E": (98, 106), "F": (107, 116)}
    catalogue = {f"{part}{n}" for part, (first, last) in parts.items() for n in range(first, last + 1)}
    in_runs = {entry for entries in programme.ENTRIES.values() for entry in entries}
    assert ENTRIES | in_runs == catalogue
    assert not ENTRIES & in_runs
