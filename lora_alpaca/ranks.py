"""The processes of a run, on Accelerate: which one this is, its device and precision, sums over all, and trackers.

The model is never wrapped. What one step needs from the others goes in one explicit sum (see `step.py`).
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState

from lora_alpaca import models
from lora_alpaca.adapters import State
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.reports import Reporter, usable_tracker


class Ranks:
    """This process among `world_size`, as a context that leaves no process group behind."""

    def __init__(self, config: FinetuneConfig):
        device = models.pick_device(config.device)
        processes = PartialState(cpu=device.type == "cpu")
        self.rank: int = processes.process_index
        self.world_size: int = processes.num_processes
        self.first = self.rank == 0
        self.reporter = Reporter(quiet=not self.first)
        self.placement, said = models.place(config, processes.device, default_bits=8)
        tracker, trouble = usable_tracker("wandb" if config.wandb_project else config.report_to)
        self.reporter.say(*said, *filter(None, [trouble]))
        self._tracker = tracker
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.placement.dtype, "no"),
            log_with=tracker,
            project_dir=config.output_dir,
        )
        self.device: torch.device = self._accelerator.device
        self.scaler: Any = self._accelerator.scaler  # of fp16 on CUDA; None otherwise

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reporter.stop()
        if kind is None and self._accelerator.trackers:
            self._accelerator.end_training()
        PartialState().destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)  # the next run may choose another precision
        GradientState._reset_state()

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
        torch.distributed.all_reduce(total)
        return total

    def wait(self) -> None:
        """Wait until every rank is here."""
        self._accelerator.wait_for_everyone()

    def first_here(self) -> Any:
        """Return a context that the first process of each machine goes through before the others."""
        return self._accelerator.local_main_process_first()

    def agree(self, value: str) -> bool:
        """Return whether every rank has the same value."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            torch.distributed.all_gather_object(values, value)
        return len(set(values)) == 1

    # ------------------------------------------------------------------------------------------- random state

    def random_state(self) -> State:
        """Return the random states of every rank: `rank0.cpu`, `rank0.cuda`, ... Every rank calls it."""
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        if self.device.type == "mps":
            own["mps"] = torch.mps.get_rng_state()
        gathered: list[Any] = [own]
        if self.world_size > 1:
            gathered = [None] * self.world_size
            torch.distributed.all_gather_object(gathered, own)
        return {f"rank{rank}.{kind}": state for rank, states in enumerate(gathered) for kind, state in states.items()}

    def restore_random_state(self, states: State) -> None:
        """Put back this rank's part of what `random_state` returned."""
        torch.set_rng_state(states[f"rank{self.rank}.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[f"rank{self.rank}.cuda"], self.device)
        if self.device.type == "mps":
            torch.mps.set_rng_state(states[f"rank{self.rank}.mps"])

    # ---------------------------------------------------------------------------------------------- trackers

    def start_tracker(self, config: FinetuneConfig, model: torch.nn.Module) -> None:
        """Begin to send figures, if a tracker was asked for and is there; a tracker that fails stops nothing."""
        if self._tracker is None:
            return
        options = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in config.model_dump().items()
        }
        name = {"name": config.wandb_run_name} if config.wandb_run_name else {}
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
