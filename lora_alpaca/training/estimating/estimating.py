"""The estimate as a story: which model, on what, which rows, by which plan; memory, time, and what would fit."""

import json
import math
import time
from dataclasses import dataclass, replace
from itertools import islice

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.environment import world_size
from lora_alpaca.config.estimating import EstimateConfig
from lora_alpaca.errors import ConfigError
from lora_alpaca.models import memory
from lora_alpaca.models.base import Base, locate_base
from lora_alpaca.models.device import DeviceSpec, as_stored, choose_device
from lora_alpaca.models.layers import check_layers
from lora_alpaca.models.meta import meta_model
from lora_alpaca.planning import estimate as formulas
from lora_alpaca.planning import plan as planning
from lora_alpaca.planning import timing
from lora_alpaca.planning.devices import RESERVED, TABLE, Device
from lora_alpaca.planning.estimate import Free, ModelSize, Parts
from lora_alpaca.planning.forecast import Forecast, Remedy
from lora_alpaca.planning.plan import Plan
from lora_alpaca.planning.preflight import check_options
from lora_alpaca.planning.recipes import fill_defaults
from lora_alpaca.planning.remedy import changes
from lora_alpaca.planning.size import model_size
from lora_alpaca.planning.timing import StepWork
from lora_alpaca.training.estimating import counting, probe
from lora_alpaca.training.estimating.counting import Computed, Counted
from lora_alpaca.training.estimating.table import lines
from lora_alpaca.training.report.rows import chosen

NOMINAL = TABLE["cpu-32"]  # of a CPU that is not measured, only ratios are taken
REST = 50_000_000  # bytes of a run on a CPU that a probe does not meet: its rows, their texts, its report
SAVING = 1.2  # seconds until an adapter is saved, with its contract and record
WRITTEN = 0.4e9  # bytes of a whole model that are converted, hashed and written in a second
ANY = 2**60  # bytes of a host that is not known
SHOWN = 4  # changes that make a run fit


@dataclass(frozen=True)
class Machine:
    """So many processes, of which so many share the memory of one machine."""

    world_size: int
    per_machine: int


def estimate(config: EstimateConfig) -> None:
    """Print what a run would take. Raises what the run itself would raise before it loads its base."""
    found = forecast(config)
    print(json.dumps(found.to_json(), indent=2) if config.json else "\n".join(lines(found)))


def forecast(config: EstimateConfig, clock: str = probe.WALL) -> Forecast:
    """Return what a run would take. Raises ConfigError, DataError, TemplateError and ModelError.

    `clock` is the one of `time` that is measured with: another one where other work runs beside.
    """
    if world_size() > 1:
        raise ConfigError("estimate is one process whatever the run has: --devices N")
    device = None if config.on == "here" else TABLE[config.on]
    run, notes = fill_defaults(config.run, config.devices)
    run.micro_batch(config.devices)
    base = locate_base(run.base_model, run.revision, run.trust_remote_code)
    spec, more = _spec(run, base, device)
    check_layers(run.layers, base)
    run, warnings = check_options(run, base)
    now = getattr(time, clock)
    begun = now()
    counted = counting.count(config, run, base)
    reading = now() - begun
    size = model_size(run, base, spec, meta_model(base))

    machine = Machine(config.devices, config.devices)
    free = _free(device, spec, config.devices)
    plan = _plan(run, counted, size, machine, free)
    computed = counting.compute(counted, run, plan, spec, config.devices)
    lengths = counted.train.lengths
    spread = planning.layout(plan.shard, run, machine)
    needed = planning.estimate_run(plan, run, lengths, size, spread)
    made = Forecast(
        base=base.name,
        device=device.name if device else _here(spec),
        devices=config.devices,
        precision=str(spec),
        rows=counted.words,
        plan=str(plan),
        memory=needed.memory,
        overhead=device.overhead if device else RESERVED[spec.device.type],
        workspace=0,
        memory_basis="by formulas",
        is_mapped=size.is_mapped and plan.shard == "none",
        free=free,
        free_is="of the device" if device else "free here",
        steps=plan.total_steps,
        tokens=formulas.tokens_per_step(lengths, run.batch_size) * plan.total_steps,
        seconds={},
        time_basis="",
        disk=needed.disk,
        price_per_hour=run.price_per_hour,
        notes=(*notes, *more, *warnings),
    )
    found = _probed(config, run, base, plan, counted, computed, size, made, clock, reading) if device is None else None
    found = found or _modelled(device, plan, counted, computed, size, made)
    if not found.fits:
        left = replace(free, device=free.device - found.overhead)
        found = replace(found, remedies=_remedies(run, base, size, left, machine, device or NOMINAL, computed))
    return found


def _spec(run: FinetuneConfig, base: Base, device: Device | None) -> tuple[DeviceSpec, list[str]]:
    if device is None:
        spec, notes = choose_device(run, default_bits=8 if run.tune == "lora" else 16)
    else:
        spec, notes = device.spec(run)
    spec, more = as_stored(spec, base.config, base.name, run)
    return spec, [*notes, *more]


def _here(spec: DeviceSpec) -> str:
    return torch.cuda.get_device_name() if spec.device.type == "cuda" else f"this machine's {spec.device.type}"


def _free(device: Device | None, spec: DeviceSpec, devices: int) -> Free:
    """Return what a process may take of a device, its libraries included, and of its host."""
    if device is not None:
        host = int(device.memory) // devices if device.kind == "cpu" else ANY
        return Free(int(device.memory) if device.kind != "cpu" else host, host)
    host = memory.free_of_host() // devices
    return Free(memory.free_and_total(spec.device)[0], host) if spec.device.type == "cuda" else Free(host, host)


def _plan(run: FinetuneConfig, counted: Counted, size: ModelSize, machine: Machine, free: Free) -> Plan:
    lengths = counted.train.lengths
    plan = planning.resolve_steps(run, len(lengths), machine.world_size)
    plan = replace(plan, shard=planning.choose_shard(run, size, free, machine))
    spread = planning.layout(plan.shard, run, machine)
    return planning.choose_engine(plan, run, lengths, size, spread, free)


def _probed(
    config: EstimateConfig,
    run: FinetuneConfig,
    base: Base,
    plan: Plan,
    counted: Counted,
    computed: Computed,
    size: ModelSize,
    made: Forecast,
    clock: str,
    reading: float,
) -> Forecast | None:
    """Return the forecast with memory and time as measured here, None where that is not asked for, or fails."""
    if not config.probe or base.trust_remote_code or plan.shard != "none":
        return None
    parts = made.parts
    mapped = parts.weights if size.is_mapped else 0  # of files, which no process holds itself
    try:
        layered = _of_layers(replace(parts, weights=parts.weights - mapped), size)
        found = probe.take(run, base, plan, layered, computed.largest, config.devices, clock)
    except probe.ProbeError as error:
        return replace(made, notes=(*made.notes, f"nothing could be measured here ({error})"))
    parts = replace(parts, activations=found.saved)
    rest = REST if made.precision.endswith("on cpu") else 0
    overhead = found.start + rest
    workspace = max(0, found.peak + rest + mapped - overhead - parts.total)
    tokens = len(counted.validation.ids) / config.devices
    passes = 1 + math.ceil(plan.total_steps / plan.eval_steps) if tokens else 0
    reported = chosen(counted.train, plan.total_steps * run.batch_size, run.report_rows, run.seed) if run.report else []
    measured = 2 * sum(int(counted.train.lengths[row]) for row in reported) / config.devices
    seconds = {
        "start": found.seconds["start"] + reading + found.seconds["load"] + found.seconds["check"],
        "training": plan.total_steps * found.step_seconds(computed.tokens) + found.compiling,
        "validation": passes * found.forward_seconds(tokens),
        "report": found.seconds["report"] + found.forward_seconds(measured),
        "save": SAVING + (size.spec.dtype.itemsize * size.parameters / WRITTEN if run.tune == "full" else 0.0),
    }
    return replace(
        made,
        memory=replace(made.memory, device=parts),
        overhead=overhead,
        workspace=workspace,
        memory_basis=found.basis,
        seconds=seconds,
        time_basis=found.basis,
    )


def _of_layers(parts: Parts, size: ModelSize) -> Parts:
    """Return what lasts of the parts that is in layers: all but embeddings, head and last norm."""
    held = [sum(one.frozen_bytes(size.spec) for one in unit if not one.is_trained) for unit in size.units]
    learning = [sum(one.numel for one in unit if one.is_trained) for unit in size.units]
    held_share = 1 - held[0] / max(1, sum(held))
    share = 1 - learning[0] / max(1, size.trainable)
    return Parts(
        weights=int(held_share * parts.weights),
        trained=int(share * parts.trained),
        gradients=int(share * parts.gradients),
        optimizer=int(share * parts.optimizer),
    )


def _modelled(
    device: Device | None, plan: Plan, counted: Counted, computed: Computed, size: ModelSize, made: Forecast
) -> Forecast:
    """Return the forecast with the time that the cost model gives; of a machine that is not in its table none."""
    if device is None:
        return replace(made, time_basis="not known: nothing was measured")
    work = StepWork(computed.tokens, computed.predictions, computed.batches, float(counted.train.lengths.mean()))
    tokens = len(counted.validation.ids) / made.devices
    held_out = StepWork(tokens, tokens / 2, tokens / max(1, plan.token_budget), work.length)
    validations = 1 + math.ceil(plan.total_steps / plan.eval_steps) if tokens else 0
    seconds = {
        "start": timing.load_seconds(size),
        "training": plan.total_steps * timing.step_seconds(device, size, work, plan.gradient_checkpointing),
        "validation": validations * timing.validation_seconds(device, size, held_out),
    }
    basis = f"estimated by the cost model of docs/cost.md, with {device.sustained:.0%} of the rates of: {device.source}"
    return replace(made, seconds=seconds, time_basis=basis)


def _remedies(
    run: FinetuneConfig, base: Base, size: ModelSize, free: Free, machine: Machine, device: Device, computed: Computed
) -> tuple[Remedy, ...]:
    """Return the cheapest changes that make a run fit, each with its cost in time by the cost model."""
    length = computed.tokens / max(1.0, computed.batches)
    asked = StepWork(computed.tokens, computed.predictions, computed.batches, length)
    as_asked = timing.step_seconds(device, size, asked, recomputes=run.gradient_checkpointing == "true")
    found = []
    for change in islice(changes(run, base, size, free, machine), SHOWN):
        budget = change.config.token_budget or planning.CPU_TOKENS
        work = replace(asked, batches=max(1.0, computed.tokens / budget))
        recomputes = change.config.gradient_checkpointing != "false"
        seconds = timing.step_seconds(device, change.size, work, recomputes, change.layout)
        words = list(change.words)
        if run.gradient_checkpointing == "auto" and size.spec.device.type != "cuda":  # where it is not chosen by itself
            words.append("--gradient_checkpointing True")
        found.append(Remedy(" ".join(words), change.memory.device.total, seconds / as_asked))
    return tuple(found)
