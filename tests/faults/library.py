"""The library's own functions that the harness wraps, by name: a change of one of them is followed here alone."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

STORY = "lora_alpaca.training.finetuning"  # once it is imported, so is all that is named here
ENTER_WORLD = "lora_alpaca.distributed.world:World.__enter__"
MAKE_WORLD = "lora_alpaca.distributed.world:World.__init__"
BACKWARD = "lora_alpaca.distributed.world:World.backward"  # (world, loss)
ROWS = "lora_alpaca.data:Rows.__init__"
RUN = "lora_alpaca.training.loop:Loop.run"  # (loop)
STEP = "lora_alpaca.training.loop:Loop._step"  # (loop)
VALIDATE = "lora_alpaca.training.loop:Loop._validate"  # (loop)
GRADIENT = "lora_alpaca.training.step:Stepper._gradient"
LOSS = "lora_alpaca.engine.engines:Engine.loss"  # (engine, batch)
BATCHES = "lora_alpaca.engine.engines:Packed.batches"  # (engine, examples, ...)
SAVE = "lora_alpaca.artifacts.checkpoint:save"
SAVE_PARTS = "lora_alpaca.training.checkpointing:FullCheckpoints._write"  # by every rank
REMOVE = "lora_alpaca.artifacts.checkpoint:remove"  # by a rotation
FINAL_SAVE = "lora_alpaca.artifacts.adapter_folder:save"
SAVE_MODEL = "lora_alpaca.artifacts.model_folder:save"


def wrap(name: str, around: Callable[[Any], Any]) -> Callable[[], None]:
    """Replace a function of the library by `around(function)`, in this process, and return what puts it back."""
    module, _, path = name.partition(":")
    owner, (*outer, attribute) = import_module(module), path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    own = getattr(owner, attribute)
    setattr(owner, attribute, around(own))
    return lambda: setattr(owner, attribute, own)


def steps_done(loop: Any) -> int:
    """Return how many steps of a run are finished."""
    return int(loop.state.step)


def history(loop: Any) -> list[dict[str, float]]:
    """Return what a run has logged."""
    return loop.state.history


def stepper(loop: Any) -> Any:
    """Return the Stepper of a run."""
    return loop.stepper


def tokens(batch: Any) -> int:
    """Return how many tokens the model computes for a batch."""
    return int(batch.input_ids.numel())
