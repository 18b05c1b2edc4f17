"""The automatic choices of a run, each made once, before the first step, and used again when the run is resumed."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.shared import DEMO, UPSTREAM_DATA
from lora_alpaca.data.sampler import steps_per_epoch
from lora_alpaca.models.base import demo_base
from lora_alpaca.training.progress import Progress


@dataclass
class Plan:
    """What was chosen. It is printed, and travels in the checkpoints."""

    total_steps: int
    warmup_steps: int
    eval_steps: int
    save_steps: int
    micro_batch_size: int
    gradient_checkpointing: bool = False
    engine: Literal["auto", "packed", "padded"] = "auto"
    token_budget: int = 2048
    compiled: bool = False

    def __str__(self) -> str:
        return (
            f"{self.total_steps} steps, {self.warmup_steps} of them warm-up; micro-batches of {self.micro_batch_size}; "
            f"validation every {self.eval_steps}, checkpoint every {self.save_steps} steps"
        )

    def learning_rate(self, step: int, config: FinetuneConfig) -> float:
        """Return the rate of a step, counted from 0: up in a line, then as --lr_scheduler says."""
        if step < self.warmup_steps:
            return config.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        factors = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return config.learning_rate * factors[config.lr_scheduler]


def fill_defaults(config: FinetuneConfig, world_size: int, reporter: Progress) -> FinetuneConfig:
    """Return the config with base and data named, and the demo base's own values where the user said nothing."""
    chosen: dict[str, Any] = {}
    if not config.base_model:
        chosen["base_model"] = DEMO
        if config.data_path:
            reporter.say("no --base_model given: using the tiny demo model in the package")
    if not config.data_path:
        chosen["data_path"] = UPSTREAM_DATA if config.base_model not in ("", DEMO) else DEMO
    if chosen.get("base_model", config.base_model) == DEMO:
        recipe = json.loads((demo_base().parent / "recipe.json").read_text(encoding="utf-8"))
        if chosen.get("data_path", config.data_path) != DEMO:
            del recipe["val_set_size"]  # it fits the demo's rows; the others fit the model
        recipe = {name: value for name, value in recipe.items() if not config.is_set(name)}
        if "micro_batch_size" in recipe:  # a default as any other: it gives way to the batch size and the ranks
            share = recipe.get("batch_size", config.batch_size) // world_size
            recipe["micro_batch_size"] = math.gcd(recipe["micro_batch_size"], share)
        reporter.say("demo recipe: " + ", ".join(f"{name} {value}" for name, value in recipe.items()))
        chosen |= recipe
    return FinetuneConfig(**{name: getattr(config, name) for name in config.model_fields_set} | chosen)


def resolve(config: FinetuneConfig, rows: int, world_size: int) -> Plan:
    """Return the plan for so many rows on so many devices, as said or by default."""
    total = config.max_steps or math.ceil(config.num_epochs * steps_per_epoch(rows, config.batch_size))
    warmup = min(100, math.ceil(total / 10)) if config.warmup_steps is None else config.warmup_steps
    return Plan(
        total_steps=total,
        warmup_steps=min(warmup, total),
        eval_steps=config.eval_steps or max(1, min(200, total // 4)),
        save_steps=config.save_steps or 200,
        micro_batch_size=config.micro_batch(world_size),
    )


ENGINE_OPTIONS = {"engine", "token_budget", "compile", "gradient_checkpointing"}  # that `resolve_engine` looks at
CPU_TOKENS = 2048  # a pack on a CPU, where more would only take memory, and the smallest on a GPU
MOST_TOKENS = 16384  # the largest on a GPU
SLOW_WORK = {"cpu": 3e13, "cuda": 3e15}  # parameters x tokens of a run from which compiling pays for itself


def resolve_engine(
    config: FinetuneConfig, plan: Plan, model: Any, device: torch.device, lengths: Sequence[int], world_size: int
) -> None:
    """Choose, into the plan, the token budget of a pack, whether to compile, and whether to recompute activations.

    Activations take about 34 bytes a token, layer and unit of width (arXiv:2205.05198, for attention that keeps no
    score matrix). On CUDA a pack may take half of what is free; below 2048 tokens, activations are recomputed.
    """
    shape = model.config.get_text_config()
    per_token = 34 * shape.num_hidden_layers * shape.hidden_size
    tokens_a_step = math.ceil(sum(lengths) / len(lengths) * config.batch_size)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    budget = max(CPU_TOKENS, min(MOST_TOKENS, free // 2 // per_token))
    plan.token_budget = config.token_budget or min(budget, math.ceil(tokens_a_step / world_size))
    plan.engine = config.engine

    work = sum(parameter.numel() for parameter in model.parameters()) * tokens_a_step * plan.total_steps / world_size
    pays = work > SLOW_WORK.get(device.type, math.inf)
    plan.compiled = config.compile == "true" or (config.compile == "auto" and pays)

    padded = plan.micro_batch_size * max(lengths)
    tokens = padded if config.engine == "padded" else max(plan.token_budget, max(lengths))
    needed = tokens * (per_token + 10 * shape.vocab_size * (config.engine == "padded"))
    wanted = device.type == "cuda" and needed > 0.7 * free
    plan.gradient_checkpointing = config.gradient_checkpointing == "true" or (
        config.gradient_checkpointing == "auto" and wanted
    )
