"""What is checked before the first heavy step."""

from pathlib import Path

import psutil

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import ConfigError, ModelError
from lora_alpaca.models import lora, memory
from lora_alpaca.models.base import Base, weight_files
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.meta import memory_bytes, meta_model
from lora_alpaca.storage.paths import user_path
from lora_alpaca.training.progress import Progress


def check_base_fits(base: Base, spec: DeviceSpec) -> list[str]:
    """Return, in a sentence, what the base's weights will take, if that is known.

    Raises ModelError where a CPU has less memory than that, and for a folder whose weight files are not whole.
    """
    if Path(base.path).is_dir():
        weight_files(base)
    if (model := meta_model(base)) is None:
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


HIGH_RATE = 0.1  # above it, LoRA as good as never learns


def preflight(config: FinetuneConfig, base: Base, spec: DeviceSpec, reporter: Progress) -> FinetuneConfig:
    """Return the config with rows no longer than the model can take; what is odd is said.

    Raises ConfigError if longer rows were asked for, ModelError for target modules that are not there and for a base
    larger than the memory, AdapterError for an --init_adapter that was not made for this base.
    """
    reporter.say(*check_base_fits(base, spec))
    if config.init_adapter:
        start = user_path(config.init_adapter)
        reporter.say(*adapter_folder.verify(start, adapter_folder.read_info(start), base))
    elif (bare := meta_model(base)) is not None:
        lora.target_modules(bare, config)
    width = base.config.get_text_config().hidden_size
    if config.lora_r > width:
        reporter.say(f"warning: --lora_r {config.lora_r} is more than the model is wide ({width}), which gains nothing")
    if config.learning_rate > HIGH_RATE:
        reporter.say(f"warning: --learning_rate {config.learning_rate} is very high; LoRA is trained with about 3e-4")
    if base.max_length is None or config.cutoff_len <= base.max_length:
        return config
    if config.is_set("cutoff_len"):
        raise ConfigError(f"--cutoff_len {config.cutoff_len}: {base.name} takes at most {base.max_length} tokens")
    reporter.say(f"cutoff_len is {base.max_length}, the most that {base.name} takes")
    return config.model_copy(update={"cutoff_len": base.max_length})
