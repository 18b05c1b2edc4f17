"""Merge an adapter into its base, prove that the result answers as base + adapter does, and save it whole.

The merge is done on the unquantised base, in fp32 where the memory is there: W + scale * B A, rounded once. What is
saved is an ordinary transformers folder with tokenizer, stop ids, and the prompt template in `lora_alpaca.json`.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import adapter_folder, prompt_contract, run_record
from lora_alpaca.artifacts.source import UNCHECKED, agreed_template
from lora_alpaca.config import ExportConfig
from lora_alpaca.errors import AdapterError, FolderError, ModelError
from lora_alpaca.export.receipt import compare, logits, probe_ids, rounding, summary
from lora_alpaca.models import lora, memory
from lora_alpaca.models.base import Base, load_base, locate_base
from lora_alpaca.models.device import DTYPES, DeviceSpec, pick_device
from lora_alpaca.models.fingerprint import weight_hashes
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.meta import memory_bytes, meta_model
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.planning.preflight import check_base_fits
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import RECORD, OutputFolder
from lora_alpaca.storage.paths import files_below, user_path


def export_hf(config: ExportConfig) -> Path:
    """Merge an adapter into its base and return the folder of the saved model.

    Raises AdapterError for an adapter that does not fit or changes nothing, and ExportError if the merged model's
    logits are not those of base + adapter; in both cases nothing is written.
    """
    output_dir, adapter = user_path(config.output_dir), user_path(config.lora_weights)
    if not adapter.exists():
        raise AdapterError(
            f"--lora_weights {adapter}: no adapter there; train one first: python finetune.py --output_dir {adapter}"
        )
    adapter_folder.require_adapter("--lora_weights", adapter)
    folder = OutputFolder(output_dir)
    folder.check(config.overwrite, "remove it, or pass --overwrite")
    origin = adapter_folder.read_info(adapter)
    template = agreed_template(config.prompt_template, origin.contract, str(adapter))
    if origin.contract is None:
        print(UNCHECKED)
    named = config.base_model or os.environ.get("BASE_MODEL", "") or origin.base_model
    if not named:
        raise AdapterError(f"{adapter} does not record its base model; name it with --base_model")
    if named != origin.base_model and origin.base_model:
        print(f"merging into {named}, as asked; the adapter records {origin.base_model}")
    revision = config.revision or (origin.base_revision if named == origin.base_model else None)
    base = locate_base(named, revision, config.trust_remote_code)
    stored = base.config.get_text_config().dtype or torch.float32
    target = stored if config.dtype == "auto" else DTYPES[config.dtype]
    _check_places(base, adapter, output_dir, target)
    device = pick_device("cpu" if config.device == "auto" else config.device)
    check_base_fits(base, spec := DeviceSpec(device, stored, bits=16))
    for warning in adapter_folder.verify(adapter, origin, base):
        print(warning)
    tokenizer = load_tokenizer(base, adapter if (adapter / "tokenizer_config.json").is_file() else None)
    template = origin.contract.keep(tokenizer) if origin.contract else template.bound(tokenizer)

    model = load_base(base, spec)
    if _fits_in_fp32(model, device):
        model = model.float()
    print(f"merging {adapter} into {base.name} in {str(model.dtype).removeprefix('torch.')}")
    peft_model = adapter_folder.load(model, adapter).eval()

    probes = probe_ids(tokenizer, template)
    with peft_model.disable_adapter():
        plain = logits(peft_model, probes)
    tuned = logits(peft_model, probes)
    changed = _merge(peft_model, adapter)
    merged = peft_model.unload()  # the layers are merged already
    receipt = compare(plain, tuned, logits(merged, probes), exact=merged.dtype == torch.float32)
    merged = merged.to(target)
    receipt |= rounding(plain, tuned, logits(merged, probes), target) | {"changed_weights": changed}

    stop_ids = prompt_contract.stop_ids(merged.generation_config.eos_token_id, tokenizer, template)
    merged.generation_config.eos_token_id = stop_ids or None
    contract = origin.contract.content if origin.contract else prompt_contract.build(tokenizer, template, stop_ids)
    with folder.staging() as stage:
        merged.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        atomic.write(stage / prompt_contract.FILE, atomic.as_json(contract))
        record = {
            "kind": "merged model",
            "status": "finished",
            "base_model": base.name,
            "base_revision": base.revision,
            "adapter": str(adapter.resolve()),
            "stop_ids": stop_ids,
            "receipt": receipt,
            "weights": weight_hashes(replace(base, path=str(stage), revision=None)),
            "versions": run_record.versions(),
            "files": files_below(stage),
        }
        atomic.write(stage / RECORD, atomic.as_json(record))
        atomic.fsync_tree(stage)
        notes = folder.publish(stage, config.overwrite)
    print(*notes, summary(receipt), f"merged model saved in {output_dir}", sep="\n")
    return output_dir


def _check_places(base: Base, adapter: Path, output_dir: Path, dtype: torch.dtype) -> None:
    """Raise where the merge must not be made: from a quantised base, onto what it is made from, or onto a full disk."""
    if getattr(base.config, "quantization_config", None):
        raise ModelError(
            f"--base_model {base.name} is stored quantised; merging needs full precision: name the model that it was "
            "quantised from"
        )
    for flag, source in (("--base_model", Path(base.path)), ("--lora_weights", adapter)):
        if output_dir.exists() and source.exists() and output_dir.samefile(source):
            raise FolderError(f"--output_dir {output_dir} is the folder of {flag}; name another folder")
    above = next(parent for parent in output_dir.resolve().parents if parent.exists())
    if (bare := meta_model(base)) is None:
        return
    needed = memory_bytes(bare, DeviceSpec(torch.device("cpu"), dtype, bits=16))
    if needed > (free := shutil.disk_usage(above).free):
        raise FolderError(
            f"--output_dir {output_dir}: the merged model takes {gigabytes(needed)}, and {gigabytes(free)} are free "
            "on that disk; name a folder on another one"
        )


def _fits_in_fp32(model: Any, device: torch.device) -> bool:
    """Return whether the model can be held in fp32 beside its stored weights, with a fifth of the memory to spare."""
    return sum(parameter.numel() for parameter in model.parameters()) * 4 < 0.8 * memory.free_and_total(device)[0]


def _merge(model: Any, adapter: Path) -> int:
    """Merge layer by layer and return how many weights changed; AdapterError if none does."""
    changed = 0
    for layer in lora.lora_layers(model):
        weight = layer.get_base_layer().weight
        before = weight.detach().clone()
        layer.merge(safe_merge=True)  # raises on NaN before it touches the weight
        changed += int(not torch.equal(before, layer.get_base_layer().weight))
    if not changed:
        raise AdapterError(f"{adapter}: merging it changes no weight; the adapter is empty (B is zero)")
    return changed
