"""One process of stage 8."""

import torch

from gpu_stages.models import examples, made, stepper_of, world
from gpu_stages.stage import SHAPES, Stage
from lora_alpaca.distributed import world as worlds
from lora_alpaca.engine import EngineChoices, fitted
from lora_alpaca.models.device import DeviceSpec


def run(stage: Stage) -> None:
    """Loss and gradient norm of a step."""
    worlds.BACKEND = "gloo"  # NCCL takes one process a card
    worlds._own_device = lambda *_: []
    shape = SHAPES["tiny"]
    with world(stage, dtype="fp32") as here:
        model, rows = made(stage, shape, 16, torch.float32), examples(shape)
        choices = EngineChoices(engine="packed", token_budget=64, micro_batch_size=2)
        spec = DeviceSpec(here.device, torch.float32, 16)
        with fitted(model, choices, spec, 0, rows, here.autocast) as (engine, _):
            step = stepper_of(stage, here, engine).step(rows, 1e-3)
        stage.tell(loss=step.loss, norm=step.grad_norm)
