"""What the two ranks of test_sharded_state.py do: they write, fail, read and gather, and note what they see."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from test_sharded_state import FACTS, learn, tiny, trainer, weights
from torch.distributed.fsdp import fully_shard

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.distributed import sharded_state
from lora_alpaca.distributed.world import World
from lora_alpaca.training import checkpointing, optimizers
from lora_alpaca.training.checkpointing import FullCheckpoints
from lora_alpaca.training.state import TrainState

FULL = errno.ENOSPC


def sharded(seed: int = 0) -> torch.nn.Module:
    """Return the tiny model, sharded over the ranks."""
    model = tiny(seed)
    fully_shard(model[0])
    fully_shard(model)
    for part in (model[0], model):
        part.set_gradient_divide_factor(2.0)  # both ranks see the same rows
        part.set_force_sum_reduction_for_comms(True)
    return model


@contextmanager
def failing(name: str, where: str) -> Iterator[None]:
    """Let a function of `os` fail for files of shards, within this context."""
    own, paths = getattr(os, name), {}
    own_open = os.open

    def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if name == "open" and where in str(path) and flags & os.O_WRONLY:
            raise OSError(FULL, os.strerror(FULL))
        descriptor = own_open(path, flags, *more, **options)
        paths[descriptor] = str(path)
        return descriptor

    def call(descriptor: int, *more: Any) -> Any:
        if where in paths.get(descriptor, ""):
            raise OSError(FULL, os.strerror(FULL))
        return own(descriptor, *more)

    os.open = opened
    if name != "open":
        setattr(os, name, call)
    try:
        yield
    finally:
        os.open = own_open
        setattr(os, name, own_open if name == "open" else own)


def said(work: Callable[[], Any]) -> str:
    """Return what an error says, nothing where there is none."""
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    except RuntimeError as error:
        return str(error)
    return ""


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return tensors as lists; every rank calls it."""
    return {name: (one.full_tensor() if hasattr(one, "full_tensor") else one).tolist() for name, one in tensors.items()}


def state_of(stepper: Any) -> dict[str, torch.Tensor]:
    """Return weights and moments of this rank."""
    own = weights(stepper) | optimizers.state(stepper.optimizer, stepper.trainable.names, stepper.parameters)
    return {name: sharded_state.local(one).clone() for name, one in own.items()}


def moments(stepper: Any) -> dict[str, torch.Tensor]:
    """Return the optimizer's state."""
    return optimizers.state(stepper.optimizer, stepper.trainable.names, stepper.parameters)


def main(folder: Path) -> None:
    """Do it all, and note it."""
    noted: dict[str, Any] = {}
    with World(FinetuneConfig(device="cpu", dtype="fp32")) as world:
        out = folder / "both"
        uninterrupted = trainer(sharded(), world)
        losses = learn(uninterrupted, 5)
        stopped = trainer(sharded(), world)
        learn(stopped, 2)
        saver = FullCheckpoints(stopped, out, "run")
        saver.save(FACTS | {"step": 2}, TrainState(step=2))
        noted["moments"] = whole(moments(stopped))

        resumed = trainer(sharded(seed=1), world)
        at = out / "checkpoint-2"
        FullCheckpoints(resumed, out, "run").restore(at, checkpoints.load(at))
        same_losses = learn(resumed, 3, begin=2) == losses[2:]
        ours, theirs = state_of(resumed), state_of(uninterrupted)
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        noted["exact"] = same_losses and same

        from_one, at = trainer(sharded(seed=1), world), folder / "single" / "checkpoint-2"
        FullCheckpoints(from_one, out, "run").restore(at, checkpoints.load(at))
        noted["from one"] = whole(moments(from_one))
        noted["weights from one"] = whole(weights(from_one))

        bad = folder / "bad"
        saver = FullCheckpoints(stopped, bad, "run")
        for rank in (0, 1):
            for name in ("open", "write", "fsync"):
                with failing(name, "shard-" if world.rank == rank else "none"):
                    noted[f"{name} on {rank}"] = said(lambda: saver.save(FACTS | {"step": 2}, TrainState(step=2)))
                world.barrier()  # the main rank, too, has left its stage
                noted[f"left by {name} on {rank}"] = [path.name for path in bad.rglob("*")]

        tensors = weights(stopped)
        expected, gathered = whole(tensors), []

        def consume(stream: Iterator[tuple[str, torch.Tensor]]) -> None:
            gathered.extend(name for name, one in stream if one.tolist() == expected[name])

        sharded_state.gather(tensors, world, consume)
        noted["gathered"] = gathered

        def fails(stream: Iterator[tuple[str, torch.Tensor]]) -> None:
            next(stream), next(stream)
            raise OSError(FULL, os.strerror(FULL))

        noted["not gathered"] = said(lambda: sharded_state.gather(tensors, world, fails))

        place = folder / ("shared" if world.rank == 0 else "elsewhere")
        noted["not shared"] = said(lambda: checkpointing.require_shared(place, world))
        apart = FullCheckpoints(stopped, place, "run")
        noted["no stage"] = said(lambda: apart.save(FACTS | {"step": 2}, TrainState(step=2)))
        noted["left by no stage"] = [path.name for path in place.rglob("*")] if place.exists() else []

        if world.rank == 1:
            with torch.no_grad():
                sharded_state.local(weights(stopped)["0.weight"])[0, 0] = float("inf")
        noted["not finite"] = said(lambda: saver.save(FACTS | {"step": 2}, TrainState(step=2)))
        (folder / f"rank {world.rank}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
