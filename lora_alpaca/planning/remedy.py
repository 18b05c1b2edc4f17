"""What to say instead where a run does not fit into memory: the cheapest change with which it does."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.models.base import Base
from lora_alpaca.models.meta import meta_model
from lora_alpaca.planning.estimate import Free, Layout, Memory, ModelSize
from lora_alpaca.planning.plan import CPU_TOKENS, Ranks, can_shard, choose_shard, layout, least_memory
from lora_alpaca.planning.size import model_size

MOST_DEVICES = 1024


@dataclass(frozen=True)
class Change:
    """Options with which a run fits, and the run that they make: its config, size and layout, and what it takes."""

    words: tuple[str, ...]
    config: FinetuneConfig
    size: ModelSize
    layout: Layout
    memory: Memory


def cheapest_change(config: FinetuneConfig, base: Base, size: ModelSize, free: Free, world: Ranks) -> str:
    """Return the options that make a run fit, as words that end a sentence."""
    for change in changes(config, base, size, free, world):
        return f"with {' '.join(change.words)} it takes {change.memory}"
    if size.spec.device.type == "cuda":
        as_asked = layout(choose_shard(config, size, free, world), config, world)
        devices = as_asked.world_size
        while (devices := 2 * devices) <= MOST_DEVICES:
            more = replace(as_asked, world_size=devices, shard="full", shard_size=devices)
            if free.holds(least_memory(config, size, more)):
                return f"take a smaller model, or {devices} such devices with --shard full"
    return "take a smaller model"


def changes(config: FinetuneConfig, base: Base, size: ModelSize, free: Free, world: Ranks) -> Iterator[Change]:
    """Yield the changes that make a run fit.

    First those that only cost time, then fewer bits, and last what trains less, or on shorter rows.
    """
    as_asked = layout(choose_shard(config, size, free, world), config, world)
    spreads = list(_spreads(config, as_asked, size))
    named: set[tuple[str, ...]] = set()  # `auto` spreads as it must, whatever it was before the change
    for words, smaller in _sizes(config, base, size):
        changed = {"tune": "lora" if smaller.adapter else "full", "optimizer": smaller.optimizer}
        is_whole = not can_shard(config.model_copy(update=changed))
        for flags, spread in spreads:
            if is_whole and spread.shard != "none":
                continue
            for batch, less in _batches(config):
                options = (*flags, *words, *batch)
                if free.holds(needed := least_memory(less, smaller, spread)):
                    if options not in named:
                        yield Change(options, less, smaller, spread, needed)
                    named.add(options)
                    break


def _batches(config: FinetuneConfig) -> Iterator[tuple[list[str], FinetuneConfig]]:
    """Yield the config as it is, and as options make its batches smaller, each with these options."""
    yield [], config
    if config.gradient_checkpointing == "false":
        config = config.model_copy(update={"gradient_checkpointing": "true"})
        flags = ["--gradient_checkpointing", "True"]
        yield flags, config
    else:
        flags = []
    planned = config.token_budget or min(CPU_TOKENS, config.batch_size * config.cutoff_len)
    if (budget := config.cutoff_len) < planned:
        yield [*flags, "--token_budget", str(budget)], config.model_copy(update={"token_budget": budget})
    for cutoff in (1024, 512, 256):
        if cutoff < min(planned, config.cutoff_len):
            less = {"token_budget": cutoff, "cutoff_len": cutoff}
            words = [*flags, "--cutoff_len", str(cutoff), "--token_budget", str(cutoff)]
            yield words, config.model_copy(update=less)


def _spreads(config: FinetuneConfig, as_asked: Layout, size: ModelSize) -> Iterator[tuple[list[str], Layout]]:
    """Yield the ways to spread the base that take ever less memory, each with the flags that it is asked for by."""
    if config.shard == "auto" and not config.shard_size and not as_asked.offloads:
        yield [], replace(as_asked, shard="none")
    yield [], as_asked
    full = replace(as_asked, shard="full", shard_size=as_asked.world_size)
    flags = ["--shard full"] if config.shard in ("none", "grads") else []
    flags += [f"--shard_size {as_asked.world_size}"] if config.shard_size else []
    if as_asked.world_size > 1 and flags:
        yield flags, full
    if size.spec.device.type == "cuda" and not as_asked.offloads:
        yield [*flags, "--offload cpu"], replace(full, offloads=True)


def _sizes(config: FinetuneConfig, base: Base, size: ModelSize) -> Iterator[tuple[list[str], ModelSize]]:
    """Yield the size as it is, and as options make it smaller, each with these options."""
    yield [], size
    if config.tune == "lora":
        yield from _with_fewer_bits(size)
        return
    if config.optimizer == "adamw":
        yield ["--optimizer adamw_8bit"], replace(size, optimizer="adamw_8bit")
    model = meta_model(base)
    layers = size.layers if config.layers == "all" else int(config.layers.partition(":")[2])
    for number in range(layers - 1, 0, -1):
        top = f"top:{number}"
        yield [f"--layers {top}"], model_size(config.model_copy(update={"layers": top}), base, size.spec, model)
    adapted = model_size(config.model_copy(update={"tune": "lora", "layers": "all"}), base, size.spec, model)
    yield ["--tune lora"], adapted
    for words, smaller in _with_fewer_bits(adapted):
        yield ["--tune lora", *words], smaller


def _with_fewer_bits(size: ModelSize) -> Iterator[tuple[list[str], ModelSize]]:
    if size.spec.kind or size.spec.device.type == "mps":  # as it is stored; bitsandbytes is not for mps
        return
    for bits in (8, 4):
        if bits < size.spec.bits:
            spec = replace(size.spec, bits=bits)
            yield [f"--load_{bits}bit"], replace(size, spec=spec, is_mapped=False)
