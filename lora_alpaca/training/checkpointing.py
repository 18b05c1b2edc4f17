"""Who writes and reads the checkpoints of a run: the main rank alone, or all ranks together.

An adapter is small, and whole on every rank: the main rank writes it, and the best one can wait in memory for a disk
that fails. The weights of full finetuning are neither: every rank writes its part, all of them know whether all parts
are there before the checkpoint appears, and the best weights are where a checkpoint has them, or nowhere.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.artifacts.checkpoint import OPTIMIZER_PARTS, WEIGHT_PARTS, Checkpoint
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.distributed import sharded_state
from lora_alpaca.distributed.sharded_state import FileFacts
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import CheckpointError, FolderError, TrainingError
from lora_alpaca.models.trainable import State
from lora_alpaca.storage import atomic
from lora_alpaca.training import optimizers
from lora_alpaca.training.job import Job
from lora_alpaca.training.saving import save_adapter, save_model
from lora_alpaca.training.state import TrainState
from lora_alpaca.training.step import Stepper


class Checkpoints(Protocol):
    """The checkpoints of a run in its output folder. Where all ranks save `together`, none can do it alone."""

    together: bool

    def save(self, facts: dict[str, Any], state: TrainState) -> None:
        """Write a checkpoint of the present step; every rank calls it.

        Raises TrainingError for tensors that are not finite, and OSError, after which `state` has a best step that is
        kept.
        """

    def restore(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Put back what a checkpoint holds of weights, optimizer and loss scale."""

    def keep(self, state: TrainState) -> None:
        """Take note of the state that the run starts from."""

    def finish(self, job: Job, record: dict[str, Any], state: TrainState) -> RunResult:
        """Save the best weights, of the last step where nothing was validated, as the result of the run, and return it.

        Raises CheckpointError where the checkpoint that has them is damaged, and TrainingError for a disk that fails.
        """


def of_run(config: FinetuneConfig, stepper: Stepper, output_dir: Path, run: str) -> Checkpoints:
    """Return the checkpoints of a run."""
    return (FullCheckpoints if config.tune == "full" else AdapterCheckpoints)(stepper, output_dir, run)


class AdapterCheckpoints:
    """Checkpoints of what is small and whole on every rank: the main rank writes them."""

    together = False

    def __init__(self, stepper: Stepper, output_dir: Path, run: str):
        self._stepper, self._output_dir, self._run = stepper, output_dir, run

    def save(self, facts: dict[str, Any], state: TrainState) -> None:
        """Write a checkpoint on the main rank; where that fails, the best weights are kept in memory."""
        stepper = self._stepper
        contents = Checkpoint(facts, stepper.weights(), stepper.optimizer_state(), state.best)
        try:
            if stepper.world.is_main:
                checkpoints.save(self._output_dir, self._run, contents, stepper.trainable.config())
        except OSError:
            if state.best_step == state.step:
                state.best = contents.weights  # until a checkpoint can be written
            raise

    def restore(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Put back what a checkpoint holds."""
        self._stepper.restore(checkpoint.weights, checkpoint.optimizer, checkpoint.facts["scaler"])

    def keep(self, state: TrainState) -> None:
        """Do nothing: `state` has the best weights, or names their checkpoint."""

    def finish(self, job: Job, record: dict[str, Any], state: TrainState) -> RunResult:
        """Save the best adapter on the main rank."""
        stepper, result = self._stepper, state.result(self._output_dir)
        last = stepper.weights()
        if stepper.world.is_main:
            save_adapter(stepper.trainable, self._best(state) or last, job, record, result)
        return result

    def _best(self, state: TrainState) -> State:
        """Return the best adapter, nothing where that is the one of the last step."""
        if state.best or state.best_step in (0, state.step):
            return state.best
        return checkpoints.weights_of(self._output_dir / f"checkpoint-{state.best_step}")


class FullCheckpoints:
    """Checkpoints of the weights of a base and their optimizer's state: every rank writes and reads its part."""

    def __init__(self, stepper: Stepper, output_dir: Path, run: str):
        self._stepper, self._output_dir, self._run = stepper, output_dir, run
        self._world: World = stepper.world
        self._kept = TrainState().best_loss, 0  # loss and step of the best weights that a checkpoint has
        self.together = self._world.world_size > 1

    def save(self, facts: dict[str, Any], state: TrainState) -> None:
        """Write a checkpoint, of all ranks or of none; where that fails, the best weights are those before."""
        groups = {WEIGHT_PARTS: self._weights(), OPTIMIZER_PARTS: self._optimizer_state()}
        self._require_finite(facts["step"], groups[WEIGHT_PARTS] | groups[OPTIMIZER_PARTS])
        is_best = state.best_step == state.step
        try:
            self._write(facts, {name: tensors for name, tensors in groups.items() if tensors})
        except OSError:
            if is_best:
                state.best_loss, state.best_step = self._kept
            raise
        if is_best:
            self.keep(state)

    def _write(self, facts: dict[str, Any], groups: dict[str, State]) -> None:
        world = self._world
        files: FileFacts = {}
        with ExitStack() as resources:
            made = world.together(lambda: self._stage(resources, facts["step"], list(groups)) if world.is_main else "")
            for name, tensors in groups.items():
                written = sharded_state.write(self._output_dir / made[0] / name, tensors, world)
                files |= {f"{name}/{file}": found for file, found in written.items()}

            def publish() -> None:
                checkpoints.publish(self._output_dir / made[0], self._output_dir, self._run, facts, files)

            world.together(lambda: publish() if world.is_main else None)

    def _stage(self, resources: ExitStack, step: int, names: list[str]) -> str:
        """Return the path, in the output folder, of a stage with folders of these names."""
        stage = resources.enter_context(checkpoints.staged(self._output_dir, step))
        for name in names:
            (stage / name).mkdir()
        return stage.relative_to(self._output_dir).as_posix()

    def _require_finite(self, step: int, tensors: State) -> None:
        """Raise TrainingError on all ranks where one of them has a tensor that is not finite."""
        own = checkpoints.not_finite({name: sharded_state.local(tensor) for name, tensor in tensors.items()})
        for name in filter(None, self._world.gather(own)):
            raise TrainingError(checkpoints.no_longer_finite(step, name))

    def restore(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Put back what a checkpoint holds, which as many ranks or others have written."""
        self._read_weights(folder)
        if (folder / OPTIMIZER_PARTS).is_dir():
            self._restore_optimizer(folder / OPTIMIZER_PARTS)
        if self._world.scaler is not None and checkpoint.facts["scaler"]:
            self._world.scaler.load_state_dict(checkpoint.facts["scaler"])

    def _restore_optimizer(self, folder: Path) -> None:
        stepper, found = self._stepper, sharded_state.contents(folder)
        for parameter in stepper.parameters:
            parameter.grad = torch.zeros_like(parameter)
        stepper.optimizer.step()  # at a rate of 0: it moves nothing, and makes the state that is read into
        stepper.optimizer.zero_grad(set_to_none=True)
        tensors = {name: tensor for name, tensor in self._optimizer_state().items() if name in found}
        sharded_state.read(folder, tensors, self._world)
        stepper.optimizer.state.clear()
        optimizers.load_state(stepper.optimizer, stepper.trainable.names, stepper.parameters, tensors)

    def keep(self, state: TrainState) -> None:
        """Take note of the best weights, which a checkpoint has."""
        self._kept = state.best_loss, state.best_step

    def finish(self, job: Job, record: dict[str, Any], state: TrainState) -> RunResult:
        """Save the best weights, which are read into the model first, tensor by tensor; no rank holds all of them."""
        stepper, result = self._stepper, state.result(self._output_dir)
        if state.best_step not in (0, state.step):
            self._read_best(self._output_dir / f"checkpoint-{state.best_step}")

        def save(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
            save_model(stepper.trainable, tensors, job, record, result)

        try:
            sharded_state.gather(self._weights(), self._world, save)
        except OSError as error:
            raise TrainingError(
                f"--output_dir {self._output_dir}: the model could not be saved there ({error.strerror or error}); "
                "free space, and --resume goes on from the last checkpoint"
            ) from None
        return result

    def _read_best(self, folder: Path) -> None:
        if reason := self._world.broadcast(lambda: checkpoints.verify(folder)):
            raise CheckpointError(f"{folder}: {reason}")
        self._read_weights(folder)

    def _read_weights(self, folder: Path) -> None:
        sharded_state.read(folder / WEIGHT_PARTS, self._weights(), self._world)
        self._stepper.strategy.forget_gathered()  # what the check at start has left gathered is not these weights

    def _weights(self) -> State:
        trainable = self._stepper.trainable
        return {name: one.detach() for name, one in zip(trainable.names, trainable.parameters, strict=True)}

    def _optimizer_state(self) -> State:
        stepper = self._stepper
        return optimizers.state(stepper.optimizer, stepper.trainable.names, stepper.parameters)


def require_shared(output_dir: Path, world: World) -> None:
    """Raise FolderError, naming a rank, unless all ranks see the output folder of the main rank."""
    with ExitStack() as resources:
        hidden = world.broadcast(
            lambda: resources.enter_context(atomic.hidden_folder(output_dir / "shared")).name  # by main alone
        )
        for rank, sees in enumerate(world.gather((output_dir / hidden / atomic.MARK).is_file())):
            if not sees:
                raise FolderError(
                    f"--output_dir {output_dir}: rank {rank} does not see the files of rank 0 there, and each rank "
                    "writes its part of a checkpoint; name a folder on a disk that all machines share"
                )
