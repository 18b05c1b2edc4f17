"""A merged model as an ordinary transformers folder, with tokenizer, stop ids, prompt contract and receipt.

The adapter is merged into the unquantised base, in fp32 if the memory suffices, and the result is rounded once.
"""

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from lora_alpaca.artifacts import adapter_folder, prompt_contract, run_record
from lora_alpaca.artifacts.source import ModelSource, named_base, open_adapter
from lora_alpaca.config import ExportConfig
from lora_alpaca.errors import AdapterError, FolderError, ModelError
from lora_alpaca.export.merge import merge
from lora_alpaca.export.receipt import compare, logits, probe_ids, rounding, summary
from lora_alpaca.models import memory
from lora_alpaca.models.base import Base, load_base
from lora_alpaca.models.device import DTYPES, DeviceSpec, pick_device
from lora_alpaca.models.fingerprint import weight_hashes
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.meta import memory_bytes, meta_model
from lora_alpaca.planning.preflight import check_base_fits
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import RECORD, OutputFolder
from lora_alpaca.storage.paths import files_below, user_path


@dataclass(frozen=True)
class Merged:
    """A merged model in the dtype that it is saved in, and what is saved with it."""

    model: Any
    source: ModelSource
    tokenizer: Any
    template: AnyTemplate
    receipt: dict[str, Any]


def export_hf(config: ExportConfig) -> Path:
    """Merge an adapter into its base and return the folder of the saved model.

    Raises AdapterError for an adapter that does not fit or changes nothing, and ExportError if the merged model's
    logits are not those of base + adapter; in both cases nothing is written.
    """
    output_dir = user_path(config.output_dir)
    source = _open(config, output_dir)
    stored = source.base.config.get_text_config().dtype or torch.float32
    saved = stored if config.dtype == "auto" else DTYPES[config.dtype]
    _check(source, output_dir, saved)
    spec = DeviceSpec(pick_device("cpu" if config.device == "auto" else config.device), stored, bits=16)
    check_base_fits(source.base, spec)
    _print(source.verify())
    merged = _merge(source, spec, saved)
    notes = _publish(merged, output_dir, config.overwrite)
    _print([*notes, summary(merged.receipt), f"merged model saved in {output_dir}"])
    return output_dir


def _open(config: ExportConfig, output_dir: Path) -> ModelSource:
    """Return the adapter that a config names and its base. Raises where there is no adapter, or no folder to write."""
    adapter = user_path(config.lora_weights)
    if not adapter.exists():
        raise AdapterError(
            f"--lora_weights {adapter}: no adapter there; train one first: python finetune.py --output_dir {adapter}"
        )
    adapter_folder.require_adapter("--lora_weights", adapter)
    OutputFolder(output_dir).check(config.overwrite, "remove it, or pass --overwrite")
    source = open_adapter(adapter, config.base_model, config.revision, config.prompt_template, config.trust_remote_code)
    _print(source.notes)
    named, recorded = named_base(config.base_model), source.info.base_model if source.info else ""
    if named and recorded and named != recorded:
        _print([f"merging into {named}, as asked; the adapter records {recorded}"])
    return source


def _check(source: ModelSource, output_dir: Path, saved: torch.dtype) -> None:
    """Raise ModelError for a quantised base, FolderError for a folder that is read from and for a full disk."""
    base = source.base
    if getattr(base.config, "quantization_config", None):
        raise ModelError(
            f"--base_model {base.name} is stored quantised; merging needs full precision: name the model that it was "
            "quantised from"
        )
    for flag, read in (("--base_model", Path(base.path)), ("--lora_weights", source.adapter)):
        if read is not None and output_dir.exists() and read.exists() and output_dir.samefile(read):
            raise FolderError(f"--output_dir {output_dir} is the folder of {flag}; name another folder")
    if (needed := merged_bytes(base, saved)) is not None:
        _require_space(output_dir, needed)


def merged_bytes(base: Base, dtype: torch.dtype) -> int | None:
    """Return the bytes that the files of a merged model take, None if the model's own code cannot tell its size."""
    bare = meta_model(base)
    return None if bare is None else memory_bytes(bare, DeviceSpec(torch.device("cpu"), dtype, bits=16))


def fits_in_fp32(num_parameters: int, free: int) -> bool:
    """Return whether a model fits into `free` bytes in fp32, with a fifth of them to spare."""
    return num_parameters * torch.float32.itemsize < 0.8 * free


def _require_space(output_dir: Path, needed: int) -> None:
    """Raise FolderError if the disk of a folder has fewer than `needed` bytes left."""
    above = next(parent for parent in output_dir.resolve().parents if parent.exists())
    if needed > (free := shutil.disk_usage(above).free):
        raise FolderError(
            f"--output_dir {output_dir}: the merged model takes {gigabytes(needed)}, and {gigabytes(free)} are free "
            "on that disk; name a folder on another one"
        )


def _merge(source: ModelSource, spec: DeviceSpec, saved: torch.dtype) -> Merged:
    """Return the merged model in the dtype `saved`, with its receipt. Raises AdapterError, ExportError."""
    assert source.adapter is not None
    tokenizer, template = source.load_tokenizer()
    model, notes = load_base(source.base, spec)
    _print(notes, sys.stderr)
    if fits_in_fp32(sum(parameter.numel() for parameter in model.parameters()), memory.free_and_total(spec.device)[0]):
        model = model.float()
    _print([f"merging {source.adapter} into {source.base.name} in {str(model.dtype).removeprefix('torch.')}"])
    model = adapter_folder.load(model, source.adapter).eval()

    probes = probe_ids(tokenizer, template)
    with model.disable_adapter():
        plain = logits(model, probes)
    tuned = logits(model, probes)
    model, changed = merge(model)
    if not changed:
        raise AdapterError(f"{source.adapter}: merging it changes no weight; the adapter is empty (B is zero)")
    receipt = compare(plain, tuned, logits(model, probes), exact=model.dtype == torch.float32)
    model = model.to(saved)
    receipt |= rounding(plain, tuned, logits(model, probes), saved) | {"changed_weights": changed}
    return Merged(model, source, tokenizer, template, receipt)


def _publish(merged: Merged, output_dir: Path, overwrite: bool) -> list[str]:
    """Write a merged model into a staging folder, move that into place, and return notes on what made room for it."""
    model, tokenizer, source = merged.model, merged.tokenizer, merged.source
    stop_ids = prompt_contract.stop_ids(model.generation_config.eos_token_id, tokenizer, merged.template)
    model.generation_config.eos_token_id = stop_ids or None
    recorded = source.contract.content if source.contract else None
    folder = OutputFolder(output_dir)
    with folder.staging() as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        contract = recorded or prompt_contract.build(tokenizer, merged.template, stop_ids)
        atomic.write(stage / prompt_contract.FILE, atomic.as_json(contract))
        atomic.write(stage / RECORD, atomic.as_json(_record(merged, stop_ids, stage)))
        atomic.fsync_tree(stage)
        return folder.publish(stage, overwrite)


def _record(merged: Merged, stop_ids: list[int], stage: Path) -> dict[str, Any]:
    """Return the record of a merged model whose other files are in a staging folder."""
    base, adapter = merged.source.base, merged.source.adapter
    assert adapter is not None
    return {
        "kind": "merged model",
        "status": "finished",
        "base_model": base.name,
        "base_revision": base.revision,
        "adapter": str(adapter.resolve()),
        "stop_ids": stop_ids,
        "receipt": merged.receipt,
        "weights": weight_hashes(replace(base, path=str(stage), revision=None)),
        "versions": run_record.versions(),
        "files": files_below(stage),
    }


def _print(notes: Iterable[str], file: TextIO | None = None) -> None:
    for note in notes:
        print(note, file=file)
