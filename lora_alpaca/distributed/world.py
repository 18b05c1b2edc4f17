"""The processes of a run, on Accelerate: which one this is, its device and precision, sums over all, and trackers.

The model is never wrapped. What one step needs from the others goes in one explicit sum (see `step.py`). A rank that
fails, dies or hangs ends the others, and they name it (see `peers.py`).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.distributed.heartbeat import ANOTHER, STOPPED, Heartbeat
from lora_alpaca.distributed.rendezvous import rendezvous
from lora_alpaca.errors import RankError
from lora_alpaca.models.device import choose_device, pick_device
from lora_alpaca.signals import Interrupted, Stop
from lora_alpaca.training.progress import Progress
from lora_alpaca.training.trackers import usable_tracker

Result = TypeVar("Result")


class World:
    """This process among `world_size`, as a context that leaves no process group behind."""

    def __init__(self, config: FinetuneConfig, stop: Stop | None = None):
        self.stop = Stop() if stop is None else stop  # one that nothing has asked yet is false
        device = pick_device(config.device)
        group = rendezvous(timedelta(seconds=config.rank_timeout))
        processes = PartialState(cpu=device.type == "cpu", **group)
        self.rank: int = processes.process_index
        self.world_size: int = processes.num_processes
        self.first = self.rank == 0
        self._seed = 0
        self._peers = Heartbeat(self.rank, self.world_size, self.stop.hurry) if self.world_size > 1 else None
        self.reporter = Progress(quiet=not self.first)
        self.spec, said = choose_device(config, processes.device, default_bits=8)
        tracker, trouble = usable_tracker("wandb" if config.wandb_project else config.report_to)
        self.reporter.say(*said, *filter(None, [trouble]))
        self._tracker = tracker
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.spec.dtype, "no"),
            log_with=tracker,
            project_dir=config.output_dir,
        )
        self.device: torch.device = self._accelerator.device
        self.scaler: Any = self._accelerator.scaler  # of fp16 on CUDA; None otherwise

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reporter.stop()
        guilty = self._guilty(error)
        if kind is None and self._accelerator.trackers:
            self._accelerator.end_training()
        if error is None or self._peers is None:
            PartialState().destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # the next run may choose another precision
        GradientState._reset_state()
        if guilty is not None:
            raise guilty from None

    def _guilty(self, error: BaseException | None) -> RankError | Interrupted | None:
        """Tell the others what this rank ends with; return the error to raise instead, where another rank caused it.

        That a signal ended the others a moment before this rank is no failure of theirs.
        """
        if self._peers is None:
            return None
        if isinstance(error, RankError):
            self._peers.say(f"{ANOTHER}{error.rank}")
            self._peers.close()
            together = self.stop and error.cause.startswith(STOPPED)
            return Interrupted(self.stop.asked, error.saved) if together else None
        if isinstance(error, Interrupted):
            self._peers.say(f"{STOPPED}{error.signal}")
            if found := self._peers.gone():
                self._peers.close()
                return RankError(*found, str(error))
        elif isinstance(error, SystemExit):
            self._peers.say(f"it left in the middle of the run, with exit code {error.code}")
        elif error is not None:
            self._peers.say((str(error) or type(error).__name__).splitlines()[0])
        self._peers.close()
        return None

    def autocast(self) -> Any:
        """Return the context in which a forward pass computes in the run's precision."""
        return self._accelerator.autocast()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, scaled if the precision is fp16."""
        self._accelerator.backward(loss)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks, on this rank's device."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device)
        self._together(lambda: torch.distributed.all_reduce(total))
        return total

    def wait(self) -> None:
        """Wait until every rank is here."""
        self._together(self._accelerator.wait_for_everyone)

    @contextmanager
    def first_here(self) -> Iterator[None]:
        """Give a context that the first process of each machine goes through before the others."""
        first = self._accelerator.is_local_main_process
        if not first:
            self.wait()
        yield
        if first:
            self.wait()

    def first_says(self, value: Callable[[], Result]) -> Result:
        """Return on every rank what `value` returns on the first."""
        found = [value() if self.first else None]
        if self.world_size > 1:
            self._together(lambda: torch.distributed.broadcast_object_list(found))
        return found[0]  # type: ignore[return-value]

    def agree(self, value: str) -> bool:
        """Return whether every rank has the same value."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            self._together(lambda: torch.distributed.all_gather_object(values, value))
        return len(set(values)) == 1

    def _together(self, call: Callable[[], Any]) -> None:
        """Make a collective call. Raises RankError naming the rank that does not take part."""
        if self._peers is None:
            call()
            return
        self._peers.calls += 1
        try:
            call()
        except RuntimeError as error:  # of the library under torch.distributed, whichever it is
            raise RankError(*self._peers.blame(str(error).splitlines()[0])) from None

    def seed(self, seed: int, step: int) -> None:
        """Set the random state in which this rank takes a step: dropout differs from rank to rank and step to step.

        It follows from the three numbers alone, so a run that goes on, or tries a step again, has it without saving it.
        """
        digest = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
        self._seed = int.from_bytes(digest[:7])
        self.seed_again()

    def seed_again(self) -> None:
        """Set the random state in which the step under way began."""
        torch.manual_seed(self._seed)

    # ---------------------------------------------------------------------------------------------- trackers

    def start_tracker(self, config: FinetuneConfig, model: torch.nn.Module, tracker_id: str = "") -> None:
        """Begin to send figures, if a tracker was asked for and is there; a tracker that fails stops nothing.

        With the `tracker_id` of a run that goes on, wandb continues its curves.
        """
        if self._tracker is None:
            return
        options = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in config.model_dump().items()
        }
        name = {"name": config.wandb_run_name} if config.wandb_run_name else {}
        if tracker_id and self._tracker == "wandb":
            name |= {"id": tracker_id, "resume": "allow"}
        try:
            self._accelerator.init_trackers(
                config.wandb_project or Path(config.output_dir).name,
                options,
                {self._tracker: name} if self._tracker != "tensorboard" else {},
            )
            if self._tracker == "wandb" and config.wandb_watch in ("gradients", "all"):
                self._accelerator.get_tracker("wandb", unwrap=True).watch(model, log=config.wandb_watch)
        except Exception as error:  # whatever goes wrong there, the training is worth more than its curves
            self.reporter.say(f"warning: --report_to {self._tracker}: {error}; going on without it".replace("\n", " "))
            self._accelerator.trackers = []

    def tracker_id(self) -> str:
        """Return what wandb knows this run by; nothing for other trackers."""
        if self._tracker != "wandb" or not self._accelerator.trackers:
            return ""
        return str(self._accelerator.get_tracker("wandb", unwrap=True).id)

    def track(self, figures: dict[str, float], step: int) -> None:
        """Send the figures of a step."""
        if self._accelerator.trackers:
            self._accelerator.log(figures, step=step)

    def keep_model(self, config: FinetuneConfig, folder: Path) -> None:
        """Give the finished adapter to wandb, if --wandb_log_model asks for it."""
        if self.first and self._tracker == "wandb" and self._accelerator.trackers and config.wandb_log_model == "true":
            self._accelerator.get_tracker("wandb", unwrap=True).log_artifact(
                str(folder), name=folder.name, type="model"
            )
