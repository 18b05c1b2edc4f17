"""What an export is of: adapters, their base, tokenizer and prompt, checked before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import adapter_folder, prompt_contract
from lora_alpaca.artifacts.source import ModelSource, is_finetuned, named_base, open_adapter, open_finetuned
from lora_alpaca.config import ExportConfig
from lora_alpaca.errors import AdapterError, ConfigError, FolderError, ModelError
from lora_alpaca.models import quantization
from lora_alpaca.models.base import base_file
from lora_alpaca.models.device import DTYPES
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.output_folder import OutputFolder, read_record
from lora_alpaca.storage.paths import user_path


@dataclass(frozen=True)
class Job:
    """Adapters with their weights, the source of the first, and what goes out with the merged model.

    Of a model that was finetuned whole there are no adapters, and it goes out as it is. `dtype` is that of the weights
    that are written, `held` how training held the base, None if as it is stored.
    """

    config: ExportConfig
    output_dir: Path
    adapters: list[tuple[Path, float]]
    source: ModelSource
    tokenizer: Any
    template: AnyTemplate
    stop_ids: list[int]
    dtype: torch.dtype
    held: quantization.Held | None
    notes: list[str]

    @property
    def name(self) -> str:
        """Return what the model is called: its repository on the hub, or its folder."""
        return self.config.push_to_hub or self.output_dir.name

    @property
    def contract(self) -> dict[str, Any]:
        """Return the content of the prompt contract: the recorded one, or that of the template that was named."""
        recorded = self.source.contract.content if self.source.contract else None
        return recorded or prompt_contract.build(self.tokenizer, self.template, self.stop_ids)


def open_job(config: ExportConfig) -> Job:
    """Return what a config asks for.

    Raises FolderError where nothing may be written, AdapterError for an adapter that is not there or does not fit its
    base, ModelError for a base that is stored quantised, and what opening adapter, tokenizer and template raises.
    """
    output_dir = user_path(config.output_dir)
    folders = _adapters(config)
    weights = config.adapter_weights or [1.0] * len(folders)
    if len(weights) != len(folders):
        raise ConfigError(f"--adapter_weights: {len(weights)} for {len(folders)} adapters in --lora_weights")
    OutputFolder(output_dir).check(config.overwrite, "remove it, or pass --overwrite")
    if is_finetuned(folders[0]) and len(folders) == 1:
        _require_of_models(config, folders[0])
        sources = [open_finetuned(folders[0], config.prompt_template, config.trust_remote_code)]
    else:
        sources = [
            open_adapter(folder, config.base_model, config.revision, config.prompt_template, config.trust_remote_code)
            for folder in folders
        ]
    source, notes = sources[0], list(sources[0].notes)
    named, recorded = named_base(config.base_model), source.info.base_model if source.info else ""
    if named and recorded and named != recorded and source.adapter:
        notes.append(f"merging into {named}, as asked; the adapter records {recorded}")
    _check(sources, output_dir)
    for other in sources:
        notes += other.verify(merging=True)
        if other.template.digest() != source.template.digest():
            notes.append(f"warning: {other.adapter} was trained with another prompt; that of {source.adapter} goes out")
    tokenizer, template, of_tokenizer = source.load_tokenizer()
    stored = source.base.config.get_text_config().dtype or torch.float32
    precision = str(read_record(folders[0]).get("precision", ""))
    return Job(
        config,
        output_dir,
        [(one.adapter, weight) for one, weight in zip(sources, weights, strict=True) if one.adapter],
        source,
        tokenizer,
        template,
        prompt_contract.stop_ids(_end_ids(source), tokenizer, template),
        stored if config.dtype == "auto" else DTYPES[config.dtype],
        quantization.held(precision),
        list(dict.fromkeys([*notes, *of_tokenizer])),
    )


def _adapters(config: ExportConfig) -> list[Path]:
    """Return the adapter folders that are named. Raises AdapterError for one without an adapter."""
    whole = user_path(config.lora_weights)
    folders = [whole] if whole.exists() else [user_path(name.strip()) for name in config.lora_weights.split(",")]
    for folder in folders:
        if not folder.exists():
            raise AdapterError(
                f"--lora_weights {folder}: no adapter there; train one first: python finetune.py --output_dir {folder}"
            )
        if not is_finetuned(folder) or len(folders) > 1:
            adapter_folder.require_adapter("--lora_weights", folder)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"--lora_weights {config.lora_weights}: names an adapter twice")
    return folders


def _require_of_models(config: ExportConfig, folder: Path) -> None:
    """Raise ConfigError for what can be asked of an adapter alone."""
    if of_adapters := [name for name in config.format if name in ("adapter", "gguf_lora")]:
        raise ConfigError(
            f"--format {of_adapters[0]}: {folder} is a model that was finetuned whole, and has no adapter; leave it out"
        )
    for name in ("base_model", "adapter_weights", "merge_into"):
        if config.is_set(name):
            raise ConfigError(f"--{name}: {folder} is a model that was finetuned whole; nothing is merged into another")


def _check(sources: list[ModelSource], output_dir: Path) -> None:
    """Raise ModelError for a quantised base, FolderError for an output folder that is read from."""
    base = sources[0].base
    if found := quantization.stored(base.config):
        raise ModelError(
            f"--base_model {base.name} is stored quantised ({found.kind}), and merging needs full precision: name the "
            "model that it was quantised from with --base_model"
        )
    if len({(source.base.path, source.base.revision) for source in sources}) > 1:
        names = " and ".join(dict.fromkeys(source.base.name for source in sources))
        raise AdapterError(f"--lora_weights: adapters on different bases, {names}; they have no sum")
    for flag, read in (("--base_model", Path(base.path)), *(("--lora_weights", one.adapter) for one in sources)):
        if read is not None and output_dir.exists() and read.exists() and output_dir.samefile(read):
            raise FolderError(f"--output_dir {output_dir} is the folder of {flag}; name another folder")


def _end_ids(source: ModelSource) -> int | list[int] | None:
    """Return the ids that end an answer by the base's own files."""
    file = base_file(source.base, "generation_config.json", optional=True)
    found = (read_json(file) if file else {}).get("eos_token_id", source.base.config.get_text_config().eos_token_id)
    listed = found if isinstance(found, list) else [found]
    return [number for number in listed if isinstance(number, int)]
