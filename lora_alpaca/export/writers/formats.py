"""The formats of an export, by the names that --format has for them: of a merged model, or of adapters alone."""

from collections.abc import Callable
from pathlib import Path

from lora_alpaca.config import ExportConfig
from lora_alpaca.errors import ConfigError
from lora_alpaca.export.job import Job
from lora_alpaca.export.progress import log
from lora_alpaca.export.tensors import ModelFacts, Writer
from lora_alpaca.export.writers.adapter_package import write_adapter
from lora_alpaca.export.writers.gguf import require_package
from lora_alpaca.export.writers.huggingface import HuggingFaceWriter
from lora_alpaca.export.writers.meta_checkpoint import MetaCheckpointWriter


def _gguf(folder: Path, facts: ModelFacts, config: ExportConfig) -> Writer:
    require_package()
    from lora_alpaca.export.writers.gguf.writer import GgufWriter  # which imports the extra

    writer = GgufWriter(folder, facts, config.gguf_type)
    log(writer.notes)
    return writer


def _gguf_lora(folder: Path, job: Job) -> list[str]:
    require_package()
    from lora_alpaca.export.writers.gguf.lora import write_gguf_lora  # which imports the extra

    write_gguf_lora(folder, job.adapters, job.source.base)
    return []


def _adapter(folder: Path, job: Job) -> list[str]:
    if len(job.adapters) > 1 or job.adapters[0][1] != 1:
        raise ConfigError("--format adapter: one adapter, as it was trained; gguf_lora takes a weighted sum of several")
    return write_adapter(folder, job.source, job.tokenizer, job.template, job.name)


WRITERS: dict[str, Callable[[Path, ModelFacts, ExportConfig], Writer]] = {
    "hf": lambda folder, facts, config: HuggingFaceWriter(folder, facts, config.max_shard_size),
    "gguf": _gguf,
    "state_dict": lambda folder, facts, config: MetaCheckpointWriter(folder, facts),
}

# Each fills a folder and returns notes.
OF_ADAPTERS: dict[str, Callable[[Path, Job], list[str]]] = {"gguf_lora": _gguf_lora, "adapter": _adapter}
