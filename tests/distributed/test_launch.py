"""How a run of several processes is started: by one command, by torchrun on two nodes, by accelerate; and who may not.

Nodes are launchers on this machine that meet over the loopback; devices are processors.
"""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import psutil
import pytest
from command import refused, run
from conftest import ROOT
from tutorials import STANFORD_ALPACA, ours_of

from lora_alpaca.cli import launching
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.accelerate_launch import take_out
from lora_alpaca.distributed.agreement import HOST, own_facts, require_same
from lora_alpaca.distributed.rendezvous import SAME, rendezvous
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import ConfigError, DataError

RUN = ("--batch_size", 4, "--micro_batch_size", 1, "--val_set_size", 4, "--cutoff_len", 96, "--load_8bit", "False",
       "--dtype", "fp32", "--device", "cpu")  # fmt: skip


@pytest.fixture
def words(tiny_llama, data_path, tmp_path):
    """Return `words(folder)`: the flags of a short run into that folder."""

    def of(folder, *more):
        files = ("--base_model", tiny_llama, "--data_path", data_path, "--output_dir", tmp_path / folder)
        return [*map(str, (*files, *RUN, *(more or ("--max_steps", 3))))]

    return of


def begin(program, *words, **variables):
    """Return a process of Python that runs a program, its output a pipe."""
    command = [sys.executable, *map(str, program), *words]
    return subprocess.Popen(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process, code=0, timeout=240):
    """Return what a process said, which must end with an exit code."""
    try:
        said = process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
    assert process.returncode == code, said[-3000:]
    return said


# ------------------------------------------------------------------------------------------------- how many processes


@pytest.mark.parametrize(
    ("options", "cards", "number"),
    [
        ({}, 8, 1),  # which a note tells how to use
        ({"shard": "full"}, 8, 8),
        ({"shard": "grads"}, 8, 8),
        ({"shard": "none"}, 8, 1),
        ({"shard": "full"}, 1, 1),
        ({"shard": "full"}, 0, 1),  # one process on a CPU works alone
        ({"shard": "full", "device": "cpu"}, 8, 1),
        ({"shard": "full", "processes": 2}, 8, 2),
        ({"processes": 4}, 8, 4),
        ({"processes": 2, "device": "cpu"}, 0, 2),
        ({"processes": 1, "shard": "full"}, 8, 1),
    ],
)
def test_how_many_processes_a_command_starts(options, cards, number, monkeypatch):
    assert launching.processes(FinetuneConfig(batch_size=16, **options), lambda: cards) == number
    monkeypatch.setenv("RANK", "0")  # what a launcher has started starts nothing
    assert launching.processes(FinetuneConfig(batch_size=16, **options), lambda: cards) == 1


def test_rows_that_cannot_be_shared_out_are_refused_before_anything_starts():
    line = refused("finetune", "--processes", 3, "--batch_size", 16, "--device", "cpu")
    assert line == "error: --batch_size 16 is no multiple of 3 devices; nearest: 15 or 18"


def test_a_program_starts_no_processes():
    """Nor does a rank of torchrun start more."""
    with pytest.raises(ConfigError, match=r"--processes 2: .* 1 run on this machine; .* torchrun --nproc_per_node=2"):
        World(FinetuneConfig(processes=2, device="cpu"))


@pytest.fixture
def cards(monkeypatch):
    """Let torch see so many cards, of which nothing is asked but their number."""

    def see(number):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: number)
        monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a card")

    return see


def test_cards_that_go_unused_are_told(cards, monkeypatch):
    from lora_alpaca.distributed.world import _own_device
    from lora_alpaca.models.device import pick_device

    cards(8)
    (note,) = _own_device(config := FinetuneConfig(), pick_device("auto"))
    assert note.startswith("one of 8 devices is used; all of them by torchrun --nproc_per_node=8 finetune.py")
    assert _own_device(config, pick_device("cpu")) == []
    monkeypatch.setenv("RANK", "0")
    assert _own_device(config, pick_device("auto")) == []


def test_more_processes_than_cards(cards, monkeypatch):
    from lora_alpaca.distributed.world import _own_device
    from lora_alpaca.models.device import pick_device

    cards(2)
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"4 processes .* has 2 cuda devices; .* --nproc_per_node=2"):
        _own_device(FinetuneConfig.model_construct(processes=None), pick_device("auto"))


# ----------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_two_nodes_train_what_one_command_trains(words, tmp_path, free_port):
    """Two launchers with a process each, that meet over the network, and one command that starts two processes."""
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port}"]
    launcher = ["-m", "torch.distributed.run", *meet, "--rdzv_id=two", ROOT / "finetune.py"]
    caches = [tmp_path / f"cache{node}" for node in (0, 1)]
    nodes = [begin(launcher, *words("nodes"), XDG_CACHE_HOME=str(cache)) for cache in caches]
    for node in nodes:
        ended(node)
    said = ended(begin([ROOT / "finetune.py"], *words("one"), "--processes", "2"))
    assert "3 steps" in said
    name = "adapter_model.safetensors"
    assert (tmp_path / "nodes" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


LONG = ("--max_steps", 4000, "--eval_steps", 4000, "--processes", 2)


def training(words):
    """Return one command's process and its two, in the middle of training."""
    process = begin([ROOT / "finetune.py"], *words)
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step "):
            children = psutil.Process(process.pid).children()
            assert len(children) == 2
            return process, children
    process.kill()
    pytest.fail(f"it ended: {said}")


def left_of(processes, seconds):
    """Return those that still run after so many seconds. One whose parent was killed may wait for ever to be reaped."""

    def lives(one):
        try:
            return one.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until = time.monotonic() + seconds
    while (left := [one for one in processes if lives(one)]) and time.monotonic() < until:
        time.sleep(0.1)
    return left


@pytest.mark.slow
def test_a_signal_reaches_all_and_the_exit_code_tells_it(words):
    process, children = training(words("out", *LONG, "--logging_steps", 1))
    process.send_signal(signal.SIGTERM)
    said = ended(process, 143)
    assert said.count(" stopped by SIGTERM: step ") == 2
    assert "is saved; --resume goes on from there" in said
    assert "Traceback" not in said
    assert not left_of(children, 30)


@pytest.mark.slow
def test_nothing_is_left_behind_by_a_command_that_is_killed(words):
    process, children = training(words("out", *LONG, "--logging_steps", 1))
    process.kill()
    left = left_of(children, 120)
    for one in left:
        one.kill()
    process.communicate(timeout=120)
    assert not left


@pytest.mark.slow
def test_stanford_alpaca_s_own_command_runs_on_the_demo(run_script, tmp_path):
    """With the flags that the answer to it names, on two processes: all weights of a model are trained, sharded."""
    command = STANFORD_ALPACA.replace("org/7b", "demo").replace("rows.json", "demo")
    words = ["--processes", "2", "--device", "cpu", "--max_steps", "2", *ours_of(command)[1]]
    said = run_script("finetune.py", *words, cwd=tmp_path, check=True, OMP_NUM_THREADS="1").stdout
    assert "weights sharded: full" in said
    assert "2 steps in" in said
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ----------------------------------------------------------------------------------------- ranks that differ


FACTS = {HOST: "a", "torch": "2.13.0", "--learning_rate": "0.1"}


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([{"torch": "2.12.0", HOST: "b"}], "the ranks differ: torch is 2.12.0 on rank 1 (b) and 2.13.0 on rank 0; do"),
        ([{}, {}, {"--learning_rate": "0.2"}], r"--learning_rate is 0.2 on rank 3 (a) and 0.1 on rank 0; do"),
        ([{"torch": "3", "--learning_rate": "1"}] * 2, "torch is 2.13.0 on rank 0 (a) and 3 on the others; --learning"),
    ],
)
def test_the_rank_that_differs_is_named_with_both_values(others, said):
    with pytest.raises(DataError) as error:
        require_same([FACTS, *(FACTS | other for other in others)], "do so", DataError)
    assert said in str(error.value)
    require_same([FACTS, FACTS | {HOST: "b"}], "do so")


def test_a_process_alone_is_not_asked_what_it_has(monkeypatch):
    """Which is a hash of all our code, and the versions of many libraries."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rendezvous(timedelta(seconds=1), lambda: pytest.fail("it was asked")) == {"timeout": timedelta(seconds=1)}


def test_what_is_compared():
    """Every option but those of a node, and those that name files, which are compared by their contents."""
    ours, other = FinetuneConfig(), FinetuneConfig(cache_dir="x", data_path="y", base_model="z", learning_rate=1e-4)
    ours, other = own_facts(ours, "cpu"), own_facts(other, "cpu")
    assert {name for name in ours if ours[name] != other[name]} == {"--learning_rate"}
    assert {"lora_alpaca", "python", "torch", "transformers", "peft", "device", "--seed"} <= ours.keys()


@pytest.fixture
def another(monkeypatch):
    """Return `another(name)`: let a second rank have something else under a name, and all else alike."""

    def differ(name):
        def gather(self, value):
            other = value | {name: "another"} if isinstance(value, dict) and name in value else value
            return [value, other]

        monkeypatch.setattr(World, "gather", gather)

    return differ


@pytest.mark.parametrize("name", ["--data_path", "--base_model", "tokenizer", "template"])
def test_nodes_with_other_files_end_before_the_model_is_loaded(another, words, name, no_model_loads):
    another(name)
    line = refused("finetune", *words("out")) if name == "--data_path" else run("finetune", *words("out")).err.strip()
    assert line.startswith(f"error: the ranks differ: {name} is another on rank 1 and ")
    assert "of sha256 " in line or " and sha256 " in line


def test_nodes_that_resume_share_a_file_system(another, words, tmp_path, no_model_loads):
    another(f"--output_dir {tmp_path / 'out'}")
    line = refused("finetune", *words("out"), "--resume")
    assert "out is another on rank 1 and free on rank 0; a run resumes from a file system that all its nodes" in line


@pytest.mark.slow
def test_nodes_with_other_options_end_before_anything_is_loaded(words, free_port):
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "LOCAL_RANK": "0"}
    ranks = [
        begin([ROOT / "finetune.py"], *words("out"), "--seed", seed, **together, RANK=rank)
        for rank, seed in (("0", "1"), ("1", "2"))
    ]
    for number, rank in enumerate(ranks):
        line = ended(rank, 2).strip()
        assert line.startswith(f"error: rank {number}: the ranks differ: --seed is 2 on rank 1 ("), line
        assert line.endswith(f") and 1 on rank 0; {SAME}")


# ------------------------------------------------------------------------------------------------------ accelerate


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "options", "said"),
    [
        (FSDP, {}, "asks for FSDP (full_shard), which is not read here: say it by --shard full, or take it out"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "(full_shard) and offload_params, .* --shard full --offload cpu"),
        (FSDP2, {}, "FSDP (false), .* --shard grads"),
        (ZERO, {}, "DeepSpeed (ZeRO stage 3) and offload to the CPU, .* --shard full --offload cpu"),
        (ZERO, {"shard": "full"}, "asks for offload to the CPU, which is not read here: say it by --offload cpu"),
        ({"ACCELERATE_USE_CPU": "True"}, {}, "asks for use_cpu, .* --device cpu"),
        ({"ACCELERATE_TORCH_DEVICE": "cpu"}, {}, "asks for the device cpu, .* --device cpu"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "turns on Megatron-LM, which there is none of here"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "fp8, which there is none of here; --dtype bf16 is"),
    ],
)  # fmt: skip
def test_what_accelerate_was_configured_to_do_is_refused_with_our_flags(variables, options, said):
    variables = dict(variables)
    with pytest.raises(ConfigError) as error:
        take_out(FinetuneConfig(**options), variables)
    for part in said.split(" .* "):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("variables", "options", "notes"),
    [
        (FSDP, {"shard": "full"}, []),
        (FSDP, {"shard": "none"}, []),  # the command's own word counts
        (ZERO, {"shard": "full", "offload": "cpu"}, []),
        (
            {"ACCELERATE_USE_CPU": "False", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"},
            {},
            [],
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            {},
            ["accelerate's mixed_precision fp16 is not read: --dtype fp16 says it"],
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"dtype": "fp16"}, []),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {},
            ["accelerate's gradient_accumulation_steps 4 is not read: --batch_size counts the rows of a step"],
        ),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            {},
            ["accelerate's dynamo backend is not read: --compile true says it"],
        ),
    ],
)
def test_what_accelerate_was_configured_to_do_is_told_and_has_no_effect(variables, options, notes):
    variables = {**variables, "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}
    assert take_out(FinetuneConfig(**options), variables) == notes
    assert variables == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}


def test_a_loss_is_not_divided_by_what_accelerate_was_configured_to(monkeypatch):
    import torch

    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.nn.Parameter(torch.ones(()))
    with World(FinetuneConfig(device="cpu", dtype="fp32")) as world:
        world.backward(weight * 8)
    assert weight.grad == 8


CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
num_machines: 1
num_processes: 2
machine_rank: 0
main_process_port: {port}
mixed_precision: fp16
rdzv_backend: static
use_cpu: false
"""
SHARDED = "fsdp_config:\n  fsdp_sharding_strategy: FULL_SHARD\n  fsdp_offload_params: true\n"


@pytest.mark.slow
def test_accelerate_starts_a_run_with_its_config_file(words, tmp_path, free_port):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "config.yaml", ROOT / "finetune.py"]
    (tmp_path / "config.yaml").write_text(CONFIG.format(kind="FSDP", port=free_port) + SHARDED)
    said = ended(begin(launcher, *words("out")), 1)
    assert "say it by --shard full --offload cpu, or take it out of that config" in said
    (tmp_path / "config.yaml").write_text(CONFIG.format(kind="MULTI_GPU", port=free_port))
    said = ended(begin(launcher, *words("out")))
    assert "accelerate's mixed_precision fp16 is not read: --dtype fp16 says it" in said
    assert "3 steps in" in said
