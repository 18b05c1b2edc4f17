"""The checks before the first heavy step: does the base fit into memory, the adapter onto the base?"""

import shutil
from pathlib import Path

import numpy as np

from lora_alpaca.artifacts.source import verify_adapter
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import ConfigError, FolderError, ModelError
from lora_alpaca.models import memory
from lora_alpaca.models.base import Base, weight_files
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.meta import memory_bytes, meta_model
from lora_alpaca.models.quantization import stored
from lora_alpaca.planning.estimate import ModelSize, disk_bytes
from lora_alpaca.planning.plan import Plan, choose_shard, estimate_run, free_memory, layout, least_memory
from lora_alpaca.planning.remedy import cheapest_change
from lora_alpaca.planning.size import model_size
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import user_path

HIGH_RATE = 0.1  # above it, LoRA hardly ever learns


def check_base_fits(base: Base, spec: DeviceSpec) -> None:
    """Raise ModelError where a CPU has less memory than the weights of a base take, or its weight files are damaged."""
    _check_files(base)
    model = meta_model(base) if spec.device.type == "cpu" else None
    if model is not None and (needed := memory_bytes(model, spec)) > (free := memory.free_of_host()):
        raise ModelError(
            f"--base_model {base.name}: its weights take {gigabytes(needed)} as {spec}, and {gigabytes(free)} "
            "are free; take a smaller model, or hold it in fewer bits (--load_8bit, --load_4bit)"
        )


def _check_files(base: Base) -> None:
    if Path(base.path).is_dir():
        weight_files(base)


def check_model(config: FinetuneConfig, base: Base, spec: DeviceSpec, world: World) -> tuple[ModelSize, list[str]]:
    """Return the size of a base with what is trained of it, and notes on both.

    Raises ModelError for target modules that are missing, and for a run that is larger than the memory, naming the
    cheapest change that is not; and AdapterError for an --init_adapter that was not made for this base.
    """
    _check_files(base)
    notes = []
    if config.init_adapter:
        notes = verify_adapter("--init_adapter", user_path(config.init_adapter), base)
    size = model_size(config, base, spec, meta_model(base))
    frozen = sum(weight.frozen_bytes(spec) for weight in size.weights)
    notes.append(f"the weights of {base.name} take about {gigabytes(frozen)}")
    check_memory(config, base, size, world)
    return size, notes


def check_memory(config: FinetuneConfig, base: Base, size: ModelSize, world: World) -> None:
    """Raise ModelError, in one line, where a run takes more memory than a rank has, however it may be sharded."""
    free = free_memory(world)
    shard = choose_shard(config, size, free, world)
    needed = least_memory(config, size, layout(shard, config, world))
    if not free.holds(needed):
        remedy = world.broadcast(lambda: cheapest_change(config, base, size, free, world))
        raise ModelError(
            f"--base_model {base.name}: as {size.spec}, with --tune {config.tune} and --shard {shard}, each of "
            f"{world.world_size} processes takes {needed}, and {free} are free for it; {remedy}"
        )


def describe_memory(plan: Plan, config: FinetuneConfig, lengths: np.ndarray, size: ModelSize, world: World) -> str:
    """Return in one line what a run by this plan takes of every device, by part."""
    spread = layout(plan.shard, config, world)
    return f"memory of each device: {estimate_run(plan, config, lengths, size, spread).memory}"


def check_disk(output_dir: Path, plan: Plan, config: FinetuneConfig, size: ModelSize) -> None:
    """Raise FolderError where the disk has less space than a run by this plan writes."""
    OutputFolder(output_dir).check_space(disk_bytes(size, config, plan.total_steps, plan.save_steps))


def check_export(config: FinetuneConfig, base: Base) -> None:
    """Raise an error, naming --export_dir, where what a run trains could not be exported there when it is done."""
    if not config.export_dir:
        return
    folder, where = OutputFolder(user_path(config.export_dir)), f"--export_dir {config.export_dir}"
    if folder.status == "foreign" or (folder.status != "free" and not config.overwrite):
        raise FolderError(f"{where} is there already; name a folder that is not")
    if found := stored(base.config):
        raise ModelError(
            f"{where}: {base.name} is stored quantised ({found.kind}), and merging needs full precision; leave it out"
        )
    weights = sum(file.stat().st_size for file in weight_files(base)) if Path(base.path).is_dir() else 0
    free = shutil.disk_usage(next(above for above in folder.real.parents if above.exists())).free
    if weights > free:
        raise FolderError(
            f"{where}: the model takes {gigabytes(weights)}, and {gigabytes(free)} are free on that disk; name a "
            "folder on another one"
        )


def check_options(config: FinetuneConfig, base: Base) -> tuple[FinetuneConfig, list[str]]:
    """Return the config with rows no longer than the model takes, and a warning for every odd value.

    Raises ConfigError if longer rows were asked for.
    """
    notes = []
    width = base.config.get_text_config().hidden_size
    if config.lora_r > width:
        notes.append(f"warning: --lora_r {config.lora_r} is more than the model is wide ({width}), which gains nothing")
    if isinstance(config.learning_rate, float) and config.learning_rate > HIGH_RATE:
        notes.append(f"warning: --learning_rate {config.learning_rate} is very high; LoRA is trained with about 3e-4")
    if not config.add_eos_token:
        notes.append(
            "warning: --add_eos_token False: the end token is not learned, so answers will not stop by themselves"
        )
    if base.max_length is None or config.cutoff_len <= base.max_length:
        return config, notes
    if config.is_set("cutoff_len"):
        raise ConfigError(f"--cutoff_len {config.cutoff_len}: {base.name} takes at most {base.max_length} tokens")
    notes.append(f"cutoff_len is {base.max_length}, the most that {base.name} takes")
    return config.model_copy(update={"cutoff_len": base.max_length}), notes
