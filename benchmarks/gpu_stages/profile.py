"""Stage 9: a profile."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from gpu_stages.models import examples, made, stepper_of, world
from gpu_stages.stage import Stage
from lora_alpaca.engine import EngineChoices, fitted
from lora_alpaca.models.device import DeviceSpec


def run(stage: Stage) -> None:
    """Where the time of a step at 1B goes: the ten largest, and a trace beside the results."""
    shape = stage.shape("1b")
    with world(stage) as here:
        model, rows = made(stage, shape, 8, here.spec.dtype), examples(shape)
        choices = EngineChoices(engine="packed", token_budget=4096, micro_batch_size=2)
        spec = DeviceSpec(here.device, here.spec.dtype, 8)
        with fitted(model, choices, spec, 0, rows, here.autocast) as (engine, _):
            stepper = stepper_of(stage, here, engine)
            stepper.step(rows, 3e-4)
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if stage.device == "cuda" else [])]
            with torch.profiler.profile(activities=kinds) as found:
                stepper.step(rows, 3e-4)
                stage.wait()
    key = "self_device_time_total" if stage.device == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    whole = sum(getattr(event, key) for event in events) or 1
    stage.tell(shares={event.key[:60]: round(getattr(event, key) / whole, 3) for event in events[:10]})
    if not stage.tiny:
        path = Path(__file__).parents[1] / "results" / "gpu-profile.json.gz"
        found.export_chrome_trace(str(path))
        stage.tell(trace=path.name)
