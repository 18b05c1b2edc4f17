"""Tensors that are spread over ranks, on the disk and on the main rank; and checkpoints that all ranks write together.

The two ranks run one programme, `sharded_state_ranks.py`, once for all tests; what each of them saw is in a file.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TORCHRUN
from safetensors.torch import load_file

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.distributed import sharded_state
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import CheckpointError, TrainingError
from lora_alpaca.models.full import FullWeights
from lora_alpaca.storage.output_folder import MANIFEST, read_manifest, remove_checkpoint
from lora_alpaca.training import optimizers
from lora_alpaca.training.checkpointing import FullCheckpoints
from lora_alpaca.training.state import TrainState

PROGRAMME = Path(__file__).with_name("sharded_state_ranks.py")
FACTS = {"plan": {}, "progress": {}, "record": {}, "scaler": None}


def tiny(seed: int = 0) -> torch.nn.Module:
    """Return a model with more and fewer rows than ranks, and one parameter that is never used."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 1), torch.nn.LayerNorm(1))
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    return model


def trainer(model: torch.nn.Module, world: World, optimizer: str = "adamw") -> SimpleNamespace:
    """Return what checkpoints look at of a Stepper."""
    config = FinetuneConfig(tune="full", optimizer=optimizer)
    trainable = FullWeights(model)
    parameters = trainable.parameters
    return SimpleNamespace(
        world=world,
        strategy=Replicated(world),
        trainable=trainable,
        parameters=parameters,
        optimizer=optimizers.build(config, trainable.names, parameters),
    )


def learn(stepper: SimpleNamespace, steps: int, begin: int = 0) -> list[float]:
    """Train for some steps and return the losses."""
    losses = []
    for group in stepper.optimizer.param_groups:
        group["lr"] = 1e-2
    for step in range(begin, begin + steps):
        rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        loss = stepper.trainable.model(rows).square().sum()
        stepper.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        stepper.optimizer.step()
        losses.append(loss.item())
    return losses


def weights(stepper: SimpleNamespace) -> dict[str, torch.Tensor]:
    """Return the weights by their names."""
    return dict(zip(stepper.trainable.names, stepper.parameters, strict=True))


@pytest.fixture(scope="module")
def world():
    with World(FinetuneConfig(device="cpu", dtype="fp32")) as world:
        yield world


# ------------------------------------------------------------------------------------------------------- one device


def test_one_device_goes_on_to_the_bit(tmp_path, world):
    whole = trainer(tiny(), world)
    expected = learn(whole, 5)
    stopped = trainer(tiny(), world)
    learn(stopped, 2)
    FullCheckpoints(stopped, tmp_path, "run").save(FACTS | {"step": 2}, TrainState(step=2))
    folder = tmp_path / "checkpoint-2"
    resumed = trainer(tiny(seed=1), world)
    assert checkpoints.verify(folder) == ""
    FullCheckpoints(resumed, tmp_path, "run").restore(folder, checkpoints.load(folder))
    assert learn(resumed, 3, begin=2) == expected[2:]
    assert states_equal(resumed, whole)


def states_equal(one: SimpleNamespace, other: SimpleNamespace) -> bool:
    """Return whether weights and moments are the same to the bit."""
    pairs = zip(one.parameters, other.parameters, strict=True)
    first, second = (optimizers.state(of.optimizer, of.trainable.names, of.parameters) for of in (one, other))
    return (
        all(torch.equal(a, b) for a, b in pairs)
        and first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
    )


def test_a_checkpoint_in_parts_is_safetensors_and_json_that_its_manifest_lists(tmp_path, world):
    stepper = trainer(tiny(), world)
    learn(stepper, 1)
    FullCheckpoints(stepper, tmp_path, "run").save(FACTS | {"step": 1}, TrainState(step=1))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    listed = read_manifest(tmp_path / "checkpoint-1")["files"]
    found = {path.relative_to(tmp_path / "checkpoint-1").as_posix() for path in files} - {MANIFEST}
    assert found == set(listed)
    for name, facts in listed.items():
        data = (tmp_path / "checkpoint-1" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"])
    remove_checkpoint(tmp_path / "checkpoint-1")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_before_the_first_moments(tmp_path, world):
    """An overflow of fp16 takes no step of the optimizer; there may be no state yet."""
    saver = FullCheckpoints(trainer(tiny(), world), tmp_path, "run")
    saver.save(FACTS | {"step": 1}, TrainState(step=1))
    resumed = trainer(tiny(seed=1), world)
    folder = tmp_path / "checkpoint-1"
    assert checkpoints.verify(folder) == ""
    FullCheckpoints(resumed, tmp_path, "run").restore(folder, checkpoints.load(folder))
    assert not resumed.optimizer.state


def test_damaged_parts_are_found(tmp_path, world):
    FullCheckpoints(trainer(tiny(), world), tmp_path, "run").save(FACTS | {"step": 1}, TrainState(step=1))
    folder = tmp_path / "checkpoint-1"
    part = next((folder / "weights").iterdir())
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert checkpoints.verify(folder) == f"weights/{part.name} is missing or damaged"
    part.unlink()
    assert checkpoints.verify(folder) == f"weights/{part.name} is missing or damaged"
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        checkpoints.newest(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path, world):
    FullCheckpoints(trainer(tiny(), world), tmp_path, "run").save(FACTS | {"step": 1}, TrainState(step=1))
    folder, other = tmp_path / "checkpoint-1", trainer(torch.nn.Sequential(torch.nn.Linear(5, 6)), world)
    with pytest.raises(CheckpointError, match=r"0.weight is \[7, 5\], and this run has \[6, 5\]"):
        FullCheckpoints(other, tmp_path, "run").restore(folder, checkpoints.load(folder))


def test_what_is_not_finite_is_not_saved(tmp_path, world):
    stepper = trainer(tiny(), world)
    learn(stepper, 1)
    with torch.no_grad():
        weights(stepper)["0.weight"][0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1: 0.weight is no longer finite"):
        FullCheckpoints(stepper, tmp_path, "run").save(FACTS | {"step": 1}, TrainState(step=1))
    assert list(tmp_path.iterdir()) == []


def test_the_best_weights_are_those_that_a_checkpoint_has(tmp_path, world, monkeypatch):
    """They are too many for memory: where their checkpoint cannot be written, the best ones are those before."""
    stepper = trainer(tiny(), world)
    saver, state = FullCheckpoints(stepper, tmp_path, "run"), TrainState(step=1, best_step=1, best_loss=2.0)
    saver.save(FACTS | {"step": 1}, state)
    state.step, state.best_step, state.best_loss = 2, 2, 1.0
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("os.write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save(FACTS | {"step": 2}, state)
    assert (state.best_step, state.best_loss) == (1, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_large_parts_are_several_files(tmp_path, world, monkeypatch):
    """A rank holds a file twice while it writes it."""
    monkeypatch.setattr(sharded_state, "FILE_BYTES", 100)
    tensors = {"a": torch.ones(30), "b": torch.zeros(20), "c": torch.ones(2), "d": torch.ones(3)}
    written = sharded_state.write(tmp_path, tensors, world)
    held = [set(load_file(tmp_path / name)) for name in sorted(written)]
    assert held == [{"a"}, {"b", "c"}, {"d"}] or held == [{"a"}, {"b", "c", "d"}]
    again = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    sharded_state.read(tmp_path, again, world)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


# -------------------------------------------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, world):
    """Return a folder with what two ranks wrote, and what each of them noted; one of them resumes from one device."""
    folder = tmp_path_factory.mktemp("ranks")
    single = trainer(tiny(), world)
    learn(single, 2)
    FullCheckpoints(single, folder / "single", "run").save(FACTS | {"step": 2}, TrainState(step=2))
    command = [*TORCHRUN, str(PROGRAMME), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    noted = [json.loads((folder / f"rank {rank}.json").read_text()) for rank in (0, 1)]
    return SimpleNamespace(folder=folder, noted=noted)


@pytest.mark.slow
def test_two_ranks_go_on_to_the_bit(ranks):
    assert all(noted["exact"] for noted in ranks.noted)


@pytest.mark.slow
def test_every_rank_has_written_its_part_and_no_more(ranks):
    folder = ranks.folder / "both" / "checkpoint-2" / "weights"
    parts = [load_file(path) for path in sorted(folder.iterdir())]
    assert len(parts) == 2
    rows = [part["0.weight"].shape[0] for part in parts]
    assert rows == [4, 3]
    assert checkpoints.verify(folder.parent) == ""


@pytest.mark.slow
def test_two_ranks_to_one(ranks, world):
    """One device goes on from what two have written, with the same weights and moments."""
    folder = ranks.folder / "both" / "checkpoint-2"
    resumed, expected = trainer(tiny(seed=1), world), trainer(tiny(), world)
    FullCheckpoints(resumed, ranks.folder, "run").restore(folder, checkpoints.load(folder))
    learn(expected, 2)
    pairs = zip(resumed.parameters, expected.parameters, strict=True)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)
    moments = optimizers.state(resumed.optimizer, resumed.trainable.names, resumed.parameters)
    assert {name: moment.tolist() for name, moment in moments.items()} == ranks.noted[0]["moments"]


@pytest.mark.slow
def test_one_rank_to_two(ranks, world):
    single = trainer(tiny(), world)
    learn(single, 2)
    moments = optimizers.state(single.optimizer, single.trainable.names, single.parameters)
    assert ranks.noted[0]["from one"] == {name: moment.tolist() for name, moment in moments.items()}
    assert ranks.noted[0]["weights from one"] == {name: one.tolist() for name, one in weights(single).items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["open", "write", "fsync"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_fails_for_one_rank_fails_for_all_and_leaves_nothing(ranks, case, rank):
    for noted in ranks.noted:
        assert noted[f"{case} on {rank}"] == f"rank {rank}: No space left on device"
    assert ranks.noted[0][f"left by {case} on {rank}"] == []


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_is_named_by_all(ranks):
    for noted in ranks.noted:
        assert noted["not finite"].startswith("step 2: 0.weight is no longer finite")


@pytest.mark.slow
def test_whole_tensors_come_to_the_main_rank_one_by_one(ranks):
    assert ranks.noted[0]["gathered"] == ["unused", "0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert ranks.noted[1]["gathered"] == []


@pytest.mark.slow
def test_a_final_save_that_fails_fails_for_all(ranks):
    for noted in ranks.noted:
        assert noted["not gathered"] == "rank 0: No space left on device"


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_folder_is_named(ranks):
    for noted in ranks.noted:
        assert "rank 1 does not see the files of rank 0 there" in noted["not shared"]
        assert noted["no stage"].startswith("rank 1: No such file")
    assert ranks.noted[0]["left by no stage"] == []
