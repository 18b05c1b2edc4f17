"""The checks before the first heavy step: does the base fit into memory, the adapter onto the base?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.artifacts.source import verify_adapter
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import ConfigError, ModelError
from lora_alpaca.models import lora, memory
from lora_alpaca.models.base import Base, weight_files
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.meta import memory_bytes, meta_model
from lora_alpaca.planning.estimate import ModelSize, disk_bytes, model_size
from lora_alpaca.planning.plan import Plan
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import user_path

HIGH_RATE = 0.1  # above it, LoRA hardly ever learns


def check_base_fits(base: Base, spec: DeviceSpec, model: Any | None = None) -> list[str]:
    """Return a sentence on what the base's weights take, if that is known; `model` is the base on the meta device.

    Raises ModelError where a CPU has less memory than that, and for a folder whose weight files are not whole.
    """
    if Path(base.path).is_dir():
        weight_files(base)
    if (model := model or meta_model(base)) is None:
        return []
    needed = memory_bytes(model, spec)
    if spec.device.type == "cpu":
        free = memory.free_and_total(spec.device)[0] + psutil.swap_memory().free
        if needed > free:
            raise ModelError(
                f"--base_model {base.name}: its weights take {gigabytes(needed)} as {spec}, and {gigabytes(free)} "
                "are free; take a smaller model, or hold it in fewer bits (--load_8bit, --load_4bit)"
            )
    return [f"the weights of {base.name} take about {gigabytes(needed)}"]


def check_model(config: FinetuneConfig, base: Base, spec: DeviceSpec) -> tuple[ModelSize, list[str]]:
    """Return the size of a base with its adapter, and notes on both.

    Raises ModelError for target modules that are missing and for a base larger than the memory, and AdapterError for an
    --init_adapter that was not made for this base.
    """
    model = meta_model(base)
    notes = check_base_fits(base, spec, model)
    if config.init_adapter:
        folder = user_path(config.init_adapter)
        notes += verify_adapter("--init_adapter", folder, base)
        tensors = adapter_folder.read_weights(folder, may_do_nothing=True)
        trainable = sum(tensor.numel() for tensor in tensors.values())
        return model_size(base, spec, model, trainable), notes
    size = model_size(base, spec, model, trainable=0)
    if model is None:
        return size, notes
    with torch.device("meta"):
        adapter = lora.attach(model, config, base)
    trainable = sum(parameter.numel() for parameter in lora.trainable_parameters(adapter))
    return replace(size, parameters=size.parameters + trainable, trainable=trainable), notes


def check_disk(output_dir: Path, plan: Plan, config: FinetuneConfig, size: ModelSize) -> None:
    """Raise FolderError where the disk has less space than a run by this plan writes."""
    OutputFolder(output_dir).check_space(disk_bytes(size, config, plan.total_steps, plan.save_steps))


def check_options(config: FinetuneConfig, base: Base) -> tuple[FinetuneConfig, list[str]]:
    """Return the config with rows no longer than the model takes, and a warning for every odd value.

    Raises ConfigError if longer rows were asked for.
    """
    notes = []
    width = base.config.get_text_config().hidden_size
    if config.lora_r > width:
        notes.append(f"warning: --lora_r {config.lora_r} is more than the model is wide ({width}), which gains nothing")
    if config.learning_rate > HIGH_RATE:
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
