"""The automatic choices of a run, each made once for all ranks, before the base is loaded, and kept when it resumes."""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.shared import DEMO, UPSTREAM_DATA
from lora_alpaca.data.sampler import steps_per_epoch
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import EngineChoices
from lora_alpaca.models import memory
from lora_alpaca.models.base import demo_base
from lora_alpaca.planning import estimate
from lora_alpaca.planning.estimate import Estimate, Free, Layout, Memory, ModelSize, Shard

CPU_TOKENS = 2048  # a pack on a CPU, where more would only take memory, and the smallest on a GPU
MOST_TOKENS = 16384  # the largest on a GPU
FULL_RECIPE = {"learning_rate": 2e-5, "lr_scheduler": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.0}  # Stanford's
COMPILE_FROM = {"cpu": 3e13, "cuda": 3e15}  # parameters x tokens of a run from which compiling pays for itself


@dataclass(kw_only=True)
class Plan(EngineChoices):
    """The choices. The plan is printed, and saved in the checkpoints."""

    total_steps: int
    warmup_steps: int
    eval_steps: int
    save_steps: int
    gradient_checkpointing: bool = False
    shard: Shard = "none"  # how the weights are spread over the ranks

    def __str__(self) -> str:
        sharded = "" if self.shard == "none" else f"; weights sharded: {self.shard}"
        return (
            f"{self.total_steps} steps, {self.warmup_steps} of them warm-up; micro-batches of {self.micro_batch_size}; "
            f"validation every {self.eval_steps}, checkpoint every {self.save_steps} steps{sharded}"
        )

    def learning_rate(self, step: int, config: FinetuneConfig) -> float:
        """Return the rate of a step, counted from 0: a linear warm-up, then as --lr_scheduler says."""
        if step < self.warmup_steps:
            return config.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        factors = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return config.learning_rate * factors[config.lr_scheduler]


def fill_defaults(config: FinetuneConfig, world_size: int) -> tuple[FinetuneConfig, list[str]]:
    """Return the config with base, data and the demo base's own values filled in where the user set none; and notes."""
    chosen: dict[str, Any] = {}
    notes = []
    if not config.base_model:
        chosen["base_model"] = DEMO
        if config.data_path:
            notes.append("no --base_model given: using the tiny demo model in the package")
    if not config.data_path:
        chosen["data_path"] = UPSTREAM_DATA if config.base_model not in ("", DEMO) else DEMO
    is_full = config.tune == "full"
    if chosen.get("base_model", config.base_model) == DEMO:
        name = "recipe_full.json" if is_full else "recipe.json"
        recipe = json.loads((demo_base().parent / name).read_text(encoding="utf-8"))
        if chosen.get("data_path", config.data_path) != DEMO or config.val_data_path:
            del recipe["val_set_size"]  # it fits the demo's rows; the others fit the model
        recipe = {name: value for name, value in recipe.items() if not config.is_set(name)}
        if "micro_batch_size" in recipe:  # a default as any other: it gives way to the batch size and the ranks
            share = recipe.get("batch_size", config.batch_size) // world_size
            recipe["micro_batch_size"] = math.gcd(recipe["micro_batch_size"], share)
        notes.append("demo recipe: " + ", ".join(f"{name} {value}" for name, value in recipe.items()))
        chosen |= recipe
    elif is_full and (recipe := {name: value for name, value in FULL_RECIPE.items() if not config.is_set(name)}):
        if config.warmup_steps is not None:
            recipe.pop("warmup_ratio", None)
        notes.append("recipe of full finetuning: " + ", ".join(f"{name} {value}" for name, value in recipe.items()))
        chosen |= recipe
    return FinetuneConfig(**{name: getattr(config, name) for name in config.model_fields_set} | chosen), notes


def resolve(config: FinetuneConfig, lengths: np.ndarray, size: ModelSize, world: World) -> Plan:
    """Return the plan for rows of these lengths, one for all ranks: it fits the rank with the least free memory."""
    plan = resolve_steps(config, len(lengths), world.world_size)
    return resolve_engine(plan, config, lengths, size, world)


def resolve_steps(config: FinetuneConfig, rows: int, world_size: int) -> Plan:
    """Return the plan for so many rows on so many ranks, its engine still to be chosen."""
    total = config.max_steps or math.ceil(config.num_epochs * steps_per_epoch(rows, config.batch_size))
    warmup = min(100, math.ceil(total / 10)) if config.warmup_steps is None else config.warmup_steps
    if config.warmup_ratio is not None:
        warmup = math.ceil(config.warmup_ratio * total)
    return Plan(
        total_steps=total,
        warmup_steps=min(warmup, total),
        eval_steps=config.eval_steps or max(1, min(200, total // 4)),
        save_steps=config.save_steps or 200,
        micro_batch_size=config.micro_batch(world_size),
        share_prefix=config.share_prefix,
    )


def resolve_engine(plan: Plan, config: FinetuneConfig, lengths: np.ndarray, size: ModelSize, world: World) -> Plan:
    """Return the plan with its sharding and its engine chosen for the least free memory of all ranks."""
    free = free_memory(world)
    plan = replace(plan, shard=choose_shard(config, size, free, world))
    return world.broadcast(lambda: choose_engine(plan, config, lengths, size, layout(plan.shard, config, world), free))


def free_memory(world: World) -> Free:
    """Return what a rank may take of its device and of its host, one for all ranks: what the poorest of them may."""
    host = world.least(memory.free_of_host()) // world.per_machine
    if world.device.type != "cuda":
        return Free(host, host)
    return Free(world.least(memory.free_and_total(world.device)[0]), host)


def layout(shard: Shard, config: FinetuneConfig, world: World) -> Layout:
    """Return how a run spreads the base over its ranks."""
    size = world.world_size
    return Layout(size, world.per_machine, shard, config.shard_size or size, config.offload == "cpu")


def choose_shard(config: FinetuneConfig, size: ModelSize, free: Free, world: World) -> Shard:
    """Return how to shard: as asked, or `full` where several ranks are there and one device does not hold the run."""
    if world.world_size == 1 and config.offload == "none":
        return "none"  # there is nobody to share with
    if config.shard != "auto":
        return config.shard
    if not can_shard(config):
        return "none"
    if config.offload != "none" or config.shard_size:
        return "full"
    fits = free.holds(least_memory(config, size, layout("none", config, world)))
    return "none" if fits else "full"


def can_shard(config: FinetuneConfig) -> bool:
    """Return whether sharded weights can be had with all else that is asked for."""
    needs_whole = config.use_dora or (config.tune == "full" and config.optimizer != "adamw")
    return not needs_whole and config.on_oom != "shrink"


def least_memory(config: FinetuneConfig, size: ModelSize, layout: Layout) -> Memory:
    """Return what a rank takes at least: with the smallest batches that are planned, and recomputing if it may."""
    tokens = config.token_budget or min(CPU_TOKENS, config.batch_size * config.cutoff_len)
    return estimate.memory(size, layout, tokens, recomputes=config.gradient_checkpointing != "false")


def choose_engine(
    plan: Plan, config: FinetuneConfig, lengths: np.ndarray, size: ModelSize, layout: Layout, free: Free
) -> Plan:
    """Return the plan with the token budget of a pack, whether to compile, and whether to recompute activations.

    On CUDA a pack may take half of what the model leaves free; below 2048 tokens, activations are recomputed.
    """
    on_cuda = size.spec.device.type == "cuda"
    tokens_a_step = estimate.tokens_per_step(lengths, config.batch_size)
    left = max(0, free.device - estimate.memory(size, layout).device.total) if on_cuda else 0
    budget = max(CPU_TOKENS, min(MOST_TOKENS, estimate.most_tokens(size, left // 2)))
    token_budget = config.token_budget or min(budget, math.ceil(tokens_a_step / layout.world_size))
    pays = estimate.work(size, tokens_a_step, plan.total_steps, layout.world_size) > COMPILE_FROM.get(
        size.spec.device.type, math.inf
    )
    plan = replace(
        plan,
        engine=config.engine,
        token_budget=token_budget,
        compiled=config.compile == "true" or (config.compile == "auto" and pays),
    )
    parts = estimate_run(plan, config, lengths, size, layout).memory.device
    short = on_cuda and parts.activations + parts.logits > 0.7 * left
    recomputes = config.gradient_checkpointing == "true" or (config.gradient_checkpointing == "auto" and short)
    return replace(plan, gradient_checkpointing=recomputes)


def estimate_run(plan: Plan, config: FinetuneConfig, lengths: np.ndarray, size: ModelSize, layout: Layout) -> Estimate:
    """Return what a run by this plan needs on one rank."""
    longest, padded = int(lengths.max()), plan.engine == "padded"
    tokens = plan.micro_batch_size * longest if padded else max(plan.token_budget, longest)
    tokens_a_step = estimate.tokens_per_step(lengths, config.batch_size)
    return Estimate(
        memory=estimate.memory(size, layout, tokens, plan.gradient_checkpointing, pads=padded),
        disk=estimate.disk_bytes(size, config, plan.total_steps, plan.save_steps),
        work=estimate.work(size, tokens_a_step, plan.total_steps, layout.world_size),
    )


def updated(before: Plan, then: Plan, now: Plan) -> Plan:
    """Return the plan of a run that resumes: as it was, but for what its changed options change.

    `then` and `now` are the plans that the options of before and of now give.
    """
    were = asdict(then)
    return replace(before, **{name: value for name, value in asdict(now).items() if value != were[name]})
