"""An adapter as it goes out by itself: a folder for PEFT, vLLM, TGI and the hub, without what belongs to its run alone.

No checkpoint, no private record and no path of this machine is in it; its model card is written from the run.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import (
    adapter_folder,
    adapter_settings,
    privacy,
    prompt_contract,
    run_record,
    tokenizer_files,
)
from lora_alpaca.artifacts.source import ModelSource
from lora_alpaca.errors import AdapterError
from lora_alpaca.export.writers import model_card
from lora_alpaca.models.lora import CONFIG, WEIGHTS
from lora_alpaca.models.trainable import State
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage import atomic
from lora_alpaca.storage.json_files import read_plain_file
from lora_alpaca.storage.output_folder import RECORD, read_record
from lora_alpaca.storage.paths import files_below, sha256

VLLMS_RANK = 16  # without a flag
ENDS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")
MERGE = "merge it: --format hf"


def bytes_needed(source: ModelSource) -> int:
    """Return about how many bytes the folder of an adapter takes."""
    assert source.adapter is not None
    return (source.adapter / WEIGHTS).stat().st_size + 50_000_000


def write_adapter(
    folder: Path,
    source: ModelSource,
    tokenizer: Any,
    template: AnyTemplate,
    name: str,
    figures: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write the adapter of a source into an empty folder, and return notes on what cannot load it as it is.

    `template` is bound to the tokenizer; `name` is how the card calls the folder, and `figures` are those of a receipt.
    Raises AdapterError for an adapter that is missing, damaged or does nothing.
    """
    adapter = source.adapter
    if adapter is None:
        raise AdapterError("--format adapter: there is no adapter to write; name one with --lora_weights")
    settings = adapter_folder.read_config(adapter, any_kind=True)
    state = adapter_folder.read_weights(adapter)
    notes = vllm_limits(settings, state, source.base.vocabulary)
    named = settings.get("base_model_name_or_path") or source.base.name
    public = privacy.published({"base_model": named})["base_model"]
    written = settings | {"base_model_name_or_path": public}
    notes += [f"{CONFIG} names the base {public}, and not its path {named}"] * (public != named)

    atomic.write(folder / CONFIG, read_plain_file(adapter / CONFIG) if written == settings else atomic.as_json(written))
    shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
    said = tokenizer_files.write(folder, source.base, tokenizer, template, source.tokenizer_folder)
    if (adapter / prompt_contract.FILE).is_file():
        atomic.write(folder / prompt_contract.FILE, read_plain_file(adapter / prompt_contract.FILE))
    record = privacy.published(read_record(adapter))
    text = model_card.card("adapter", name, source.base, record, written, template, notes, figures)
    atomic.write(folder / model_card.FILE, text.encode())
    atomic.write(folder / RECORD, atomic.as_json(_record(record, source, written, folder)))
    return [*said, *notes]


def vllm_limits(settings: Mapping[str, Any], state: State, vocabulary: int) -> list[str]:
    """Return what vLLM, which checks little of an adapter, does not load or needs a flag for: a sentence for each."""
    kind, rank = settings.get("peft_type"), model_card.highest_rank(settings)
    if kind != "LORA":
        return [f"vLLM cannot load an adapter of kind {kind}; {MERGE}"]
    needed = model_card.rank_of_vllm(settings)
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if settings.get(key)]
    ends = sorted({part for key in state for part in key.split(".") if part in ENDS and "lora_" in key})
    whole = [tensor for key, tensor in state.items() if set(key.split(".")) & {*ENDS} and "lora_" not in key]
    added = any(len(tensor) > vocabulary for tensor in whole)
    biased = settings.get("bias", "none") != "none" or settings.get("lora_bias")
    reasons = {
        f"vLLM needs --max-lora-rank {needed}: the rank is {rank}": needed > VLLMS_RANK,
        f"vLLM cannot load a rank of {rank}, over 512; {MERGE}": not needed,
        f"vLLM cannot load DoRA; {MERGE}": settings.get("use_dora"),
        f"vLLM cannot load modules_to_save; {MERGE}": settings.get("modules_to_save"),
        f"vLLM cannot load trained biases; {MERGE}": biased,
        f"vLLM cannot load trainable_token_indices; {MERGE}": settings.get("trainable_token_indices"),
        f"vLLM cannot load target_parameters; {MERGE}": settings.get("target_parameters"),
        f"vLLM cannot heed {' and '.join(patterns)}, and scales every layer alike; {MERGE}": patterns,
        f"vLLM cannot load tokens that were added to the vocabulary; {MERGE}": added,
        f"vLLM loads LoRA on {', '.join(ends)} for some architectures only; else {MERGE}": ends,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _record(record: dict[str, Any], source: ModelSource, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the record of a written folder: that of the run, or of what is known without one."""
    effective = adapter_settings.effective(settings) if settings.get("peft_type") == "LORA" else None
    known = record or {
        "kind": "adapter",
        "base_model": settings["base_model_name_or_path"],
        "base_revision": source.base.revision,
        "base_is_local": source.base.revision is None,
        "versions": run_record.versions(),
    }
    found: dict[str, Any] = {
        "status": "finished",
        "adapter_sha256": sha256(folder / WEIGHTS),
        "files": files_below(folder),
    }
    if effective is not None:
        found |= {"adapter_settings": effective, "adapter_settings_sha256": adapter_settings.digest(effective)}
    return known | found
