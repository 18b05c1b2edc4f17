"""What the stages of a step share: one step of ours or of a rival, timed, with its memory."""

from typing import Any

import numpy as np
import rivals
import torch

from gpu_stages.models import examples, made, options, random_base, stepper_of, world
from gpu_stages.stage import Stage
from lora_alpaca.engine import fitted
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.meta import meta_model
from lora_alpaca.planning import plan as plans
from lora_alpaca.planning.estimate import Layout
from lora_alpaca.planning.size import model_size

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "T4": 65e12, "L4": 121e12}


def measure(stage: Stage, name: str, ways: dict[str, tuple[str, int]]) -> None:
    """Tell the figures of one step at a shape for every way: the rival, or none, and the bits of the base."""
    shape = stage.shape(name)
    found: dict[str, dict[str, Any]] = {}
    rows, tokens = examples(shape), shape[4] * shape[5]
    with world(stage) as here:
        for way, (rival, bits) in ways.items():
            try:
                model = made(stage, shape, bits, here.spec.dtype, rival)
                if stage.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                if rival:
                    seconds = [rivals.step(rival, model, rows, here.spec.dtype)[0] for _ in range(2)]
                    found[way] = {"seconds": seconds[-1], "tokens_per_second": tokens / seconds[-1]}
                else:
                    found[way] = _ours(stage, here, model, bits, shape, rows, tokens)
                found[way] |= _memory(stage)
            except Exception as error:  # the others are told all the same
                found[way] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            model = None
            stage.tell(compute=str(here.spec), shape=shape, ways=found)
            if stage.device == "cuda":
                torch.cuda.empty_cache()
    if failed := [way for way, figures in found.items() if "failed" in figures and way.startswith("ours")]:
        raise RuntimeError(f"{', '.join(failed)}: {found[failed[0]]['failed']}")


def _ours(
    stage: Stage, here: Any, model: Any, bits: int, shape: tuple[int, ...], rows: list[Any], tokens: int
) -> dict[str, Any]:
    """Return the figures of a step of ours, by a plan of our own, and what the plan thought that it takes."""
    config, base = options(stage), random_base(shape)
    spec = DeviceSpec(torch.device(stage.device), here.spec.dtype, bits)
    lengths = np.array([len(row.ids) for row in rows])
    size = model_size(config, base, spec, meta_model(base))
    plan = plans.resolve_steps(config, len(rows), 1)
    free = plans.free_memory(here)
    taken = torch.cuda.memory_allocated() if stage.device == "cuda" else 0
    free = type(free)(free.device + taken, free.host)  # the model is there already
    plan = plans.choose_engine(plan, config, lengths, size, Layout(), free)
    if plan.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    with fitted(model, plan, spec, 0, rows, here.autocast) as (engine, notes):
        if stage.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        stepper = stepper_of(stage, here, engine)
        seconds = stage.median(lambda: stepper.step(rows, 3e-4), 1 if stage.tiny else 3)
    figures = {
        "seconds": seconds, "tokens_per_second": tokens / seconds, "engine": str(engine),
        "recomputes": plan.gradient_checkpointing, "notes": notes,
        "estimated_gb": plans.estimate_run(plan, config, lengths, size, Layout()).memory.device.total / 1e9,
    }  # fmt: skip
    card = torch.cuda.get_device_name() if stage.device == "cuda" else ""
    if peak := next((rate for name, rate in PEAK.items() if name in card), None):  # frozen weights have no gradient
        figures["mfu"] = 4 * size.parameters * tokens / seconds / peak
    return figures


def _memory(stage: Stage) -> dict[str, float]:
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if stage.device == "cuda" else {}
