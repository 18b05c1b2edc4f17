"""The automatic choices of a run, each made once for all ranks, before the base is loaded, and kept when it resumes."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

import numpy as np

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.sampler import steps_per_epoch
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import EngineChoices
from lora_alpaca.models import memory
from lora_alpaca.planning import estimate
from lora_alpaca.planning.budget import Budget
from lora_alpaca.planning.estimate import Estimate, Free, Layout, Memory, ModelSize, Shard

CPU_TOKENS = 2048  # a pack on a CPU, where more would only take memory, and the smallest that recomputes on a GPU
LEAST_TOKENS = 512  # the smallest on a GPU
# tokens whose products take a card as long as it takes to read the weights of a base, by its bits, once they are in the
# dtype that computes: bytes moved a weight, times the operations of a card for each byte that it moves (estimated: 200)
READING_TOKENS = {16: 200, 8: 500, 4: 450}
MOST_TOKENS = 16384  # the largest on a GPU
COMPILE_FROM = {"cpu": 3e13, "cuda": 3e15}  # parameters x tokens of a run from which compiling pays for itself


@dataclass(kw_only=True)
class Plan(EngineChoices):
    """The choices. The plan is printed, and saved in the checkpoints.

    Of a run within a budget it also holds what the time has decided: `rates` of the steps, and `validated_at`, the
    steps after which it validated.
    """

    total_steps: int
    warmup_steps: int
    eval_steps: int
    save_steps: int
    gradient_checkpointing: bool = False
    shard: Shard = "none"  # how the weights are spread over the ranks
    within: str = ""  # what else decides the number of steps, once some are timed
    rates: list[float] = field(default_factory=list)
    validated_at: list[int] = field(default_factory=list)
    reads_hidden: bool | None = None  # whether the layers below are read from a file; None until that is known

    def __str__(self) -> str:
        sharded = "" if self.shard == "none" else f"; weights sharded: {self.shard}"
        within = f", or as many as {self.within} leaves time for" if self.within else ""
        return (
            f"{self.total_steps} steps, {self.warmup_steps} of them warm-up{within}; micro-batches of "
            f"{self.micro_batch_size}; validation every {self.eval_steps}, checkpoint every {self.save_steps} "
            f"steps{sharded}"
        )

    def learning_rate(self, step: float, config: FinetuneConfig) -> float:
        """Return the rate of a step, counted from 0: a linear warm-up, then as --lr_scheduler says.

        A fraction is of a run whose time goes faster than its steps.
        """
        if step < self.warmup_steps:
            return config.peak_rate * min(step + 1, self.warmup_steps) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        factors = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return config.peak_rate * factors[config.lr_scheduler]


class Ranks(Protocol):
    """How many processes a run has, and how many of them share the memory of a machine."""

    @property
    def world_size(self) -> int:
        """Return the number of processes."""

    @property
    def per_machine(self) -> int:
        """Return the number of those on one machine."""


def resolve(config: FinetuneConfig, lengths: np.ndarray, size: ModelSize, world: World) -> Plan:
    """Return the plan for rows of these lengths, one for all ranks: it fits the rank with the least free memory."""
    plan = resolve_steps(config, len(lengths), world.world_size)
    return resolve_engine(plan, config, lengths, size, world)


def resolve_steps(config: FinetuneConfig, rows: int, world_size: int) -> Plan:
    """Return the plan for so many rows on so many ranks, its engine still to be chosen."""
    total = config.max_steps or math.ceil(config.num_epochs * steps_per_epoch(rows, config.batch_size))
    budget = Budget.of(config)
    return Plan(
        total_steps=total,
        warmup_steps=warmup_steps(config, total),
        eval_steps=eval_steps(config, total),
        save_steps=config.save_steps or 200,
        within=str(budget) if budget.is_limited else "",
        micro_batch_size=config.micro_batch(world_size),
        share_prefix=config.shares_prefix,
    )


def most_steps(config: FinetuneConfig, rows: int) -> float:
    """Return the steps that a run may have by its options, infinity where its time alone ends it."""
    return math.inf if config.fills_time else resolve_steps(config, rows, 1).total_steps


def warmup_steps(config: FinetuneConfig, total: int) -> int:
    """Return the steps in which the rate rises, of so many in all."""
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * total)
    return min(total, min(100, math.ceil(total / 10)) if config.warmup_steps is None else config.warmup_steps)


def eval_steps(config: FinetuneConfig, total: int) -> int:
    """Return after how many steps a run of so many in all validates."""
    return config.eval_steps or max(1, min(200, total // 4))


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


def layout(shard: Shard, config: FinetuneConfig, world: Ranks) -> Layout:
    """Return how a run spreads the base over its ranks."""
    size = world.world_size
    return Layout(size, world.per_machine, shard, config.shard_size or size, config.offload == "cpu")


def choose_shard(config: FinetuneConfig, size: ModelSize, free: Free, world: Ranks) -> Shard:
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
    needs_whole = (
        config.use_dora
        or bool(config.lora_target_parameters)
        or (config.tune == "full" and config.optimizer != "adamw")
    )
    return not needs_whole and config.on_oom != "shrink"


def least_memory(config: FinetuneConfig, size: ModelSize, layout: Layout) -> Memory:
    """Return what a rank takes at least: with the smallest batches that are planned, and recomputing if it may."""
    tokens = config.token_budget or min(CPU_TOKENS, config.batch_size * config.cutoff_len)
    return estimate.memory(size, layout, tokens, recomputes=config.gradient_checkpointing != "false")


def choose_engine(
    plan: Plan, config: FinetuneConfig, lengths: np.ndarray, size: ModelSize, layout: Layout, free: Free
) -> Plan:
    """Return the plan with the token budget of a pack, whether to compile, and whether to recompute activations.

    On CUDA the activations of a pack may take half of what the model leaves free.
    """
    on_cuda = size.spec.device.type == "cuda"
    tokens_a_step = estimate.tokens_per_step(lengths, config.batch_size)
    left = max(0, free.device - estimate.memory(size, layout).device.total) if on_cuda else 0
    most = math.ceil(tokens_a_step / layout.world_size)
    recomputes = config.gradient_checkpointing == "true"
    if on_cuda and config.gradient_checkpointing == "auto":
        recomputes = _recomputing_pays(size, left, config.token_budget or most, int(lengths.max()))
    budget = max(CPU_TOKENS if recomputes or not on_cuda else LEAST_TOKENS, _most_tokens(size, left, recomputes))
    pays = estimate.work(size, tokens_a_step, plan.total_steps, layout.world_size) > COMPILE_FROM.get(
        size.spec.device.type, math.inf
    )
    return replace(
        plan,
        engine=config.engine,
        token_budget=config.token_budget or min(budget, most),
        compiled=config.compile == "true" or (config.compile == "auto" and pays),
        gradient_checkpointing=recomputes,
    )


def _most_tokens(size: ModelSize, left: int, recomputes: bool) -> int:
    """Return the tokens of the largest pack whose activations take half of the memory that is left."""
    return min(MOST_TOKENS, left // 2 // estimate.activation_bytes(size, recomputes))


def _recomputing_pays(size: ModelSize, left: int, wanted: int, longest: int) -> bool:
    """Return whether packs that recompute activations, and are larger, take less time by the token, or alone fit.

    A pack passes the weights forward and backward, for their own gradients too where they learn, and once more where it
    recomputes. In each pass it reads them, which takes as long as the products of some tokens.
    """
    least = max(longest, min(wanted, LEAST_TOKENS))
    tokens = {
        recomputes: min(wanted, max(_most_tokens(size, left, recomputes), CPU_TOKENS if recomputes else 0))
        for recomputes in (False, True)
    }
    if tokens[False] < least:
        return True
    passes_kept = 3 if any(weight.is_trained for weight in size.weights) else 2
    passes = {False: passes_kept, True: passes_kept + 1}
    times = {kept: passes[kept] * (1 + READING_TOKENS[size.spec.bits] / tokens[kept]) for kept in passes}
    return times[True] < times[False]


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
