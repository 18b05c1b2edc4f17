"""The small files of a model as they go out: those of the base, byte for byte wherever nothing is to be changed.

Where something is, those keys are changed in the file of the base, and the names of transformers 4 and of transformers
5 both stand in it: readers of the older ones take what they do not find to be a default, in silence.
"""

import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import tokenizer_files
from lora_alpaca.artifacts.source import ModelSource
from lora_alpaca.errors import ModelError
from lora_alpaca.models import generation_config
from lora_alpaca.models.base import Base, base_file
from lora_alpaca.models.small_files import TOKENIZER, small_files
from lora_alpaca.models.special_tokens import CONFIG as TOKENIZER_CONFIG
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage import atomic
from lora_alpaca.storage.json_files import read_json, read_plain_file, require_object

CONFIG = "config.json"
KNOWN = (  # what the repository of a model on the hub may have beside its weights and its tokenizer
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
CARRIED = ("*.json", "*.txt", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")  # of a folder
LEFT = (  # of these: what says where weights are, what belongs to a run, an adapter or a form that is not written
    CONFIG, generation_config.FILE, *TOKENIZER, "*.index.json", "lora_alpaca*", "prompt_contract.json",
    "*receipt*", "adapter_config.json", "trainer_state.json", "*_results.json", "quant*_config.json", "params.json",
)  # fmt: skip

# One file as it goes out: its bytes, and notes on what was changed in it.
_Written = tuple[bytes, list[str]]


def write(
    folder: Path,
    source: ModelSource,
    tokenizer: Any,
    template: AnyTemplate,
    stop_ids: list[int],
    dtype: torch.dtype,
    tied: bool,
    vocabulary: int | None = None,
) -> list[str]:
    """Write all small files of a model into a folder, and return what a user is told of them.

    `dtype` is that of its weights, `tied` whether its head is its embeddings, and `vocabulary` the number of its tokens
    if it is not the base's. `template` is bound to the tokenizer. Raises ModelError for a file of the base that is
    damaged.
    """
    base = source.base
    config, of_config = _config(base, dtype, tied, vocabulary)
    generation, of_generation = _generation_config(base, stop_ids)
    notes = tokenizer_files.write(folder, base, tokenizer, template, source.tokenizer_folder)
    files = {CONFIG: config, generation_config.FILE: generation, **_others(base), **_code(base)}
    for name, content in files.items():
        atomic.write(folder / name, content)
    return [*of_config, *of_generation, *notes]


def _config(base: Base, dtype: torch.dtype, tied: bool, vocabulary: int | None = None) -> _Written:
    """Return the config of the model that goes out."""
    content, as_it_is = _read(base, CONFIG)
    changed, said = dict(content), []
    changed.pop("quantization_config", None)  # what goes out is not
    if os.path.isabs(str(content.get("_name_or_path"))):  # on the machine where the base was made
        del changed["_name_or_path"]
    if "auto_map" in content and not base.trust_remote_code:
        del changed["auto_map"]
        said.append(f"{CONFIG}: auto_map, which names code of the base, is left out: the model ran without that code")
    if base.config.get_text_config().tie_word_embeddings != tied:
        for part in _parts(changed, "tie_word_embeddings"):
            part["tie_word_embeddings"] = tied
    for part in [changed, *_inner(changed)] if vocabulary else []:
        if part.get("vocab_size") == base.vocabulary:
            part["vocab_size"] = vocabulary
    name = str(dtype).removeprefix("torch.")
    for part in _parts(changed, "dtype", "torch_dtype"):
        if {part.get("dtype", name), part.get("torch_dtype", name)} != {name} or "torch_dtype" not in part:
            part |= {"torch_dtype": name, "dtype": name}
    for part in [changed, *_inner(changed)]:
        old = _old_rope(part.get("rope_parameters"), part.get("model_type"))
        part |= {key: value for key, value in old.items() if key not in part}
    return (as_it_is if changed == content else atomic.as_json(changed)), said


def _parts(content: dict[str, Any], *keys: str) -> list[dict[str, Any]]:
    """Return a config, and those configs in it that have one of some keys."""
    return [content, *(part for part in _inner(content) if any(key in part for key in keys))]


def _inner(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the configs in a config, such as that of its text model, as copies that stand in it."""
    names = [name for name, part in content.items() if name.endswith("_config") and isinstance(part, dict)]
    for name in names:
        content[name] = dict(content[name])
    return [content[name] for name in names]


def _old_rope(parameters: Any, model_type: Any) -> dict[str, Any]:
    """Return the keys that transformers 4 has for rotary positions of one kind, or of Gemma 3's two."""
    if not isinstance(parameters, dict):
        return {}
    if isinstance(inner := parameters.get("full_attention"), dict):
        local = parameters.get("sliding_attention")
        of_local = {"rope_local_base_freq": local.get("rope_theta")} if isinstance(local, dict) else {}
        return _old_rope(inner, model_type) | of_local
    names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    if str(model_type).startswith("gpt_neox"):
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    found = {old: parameters[new] for new, old in names.items() if new in parameters}
    scaling = {key: value for key, value in parameters.items() if key not in names}
    return found | {"rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None}


def _generation_config(base: Base, stop_ids: list[int]) -> _Written:
    """Return the generation config of the model that goes out."""
    if base_file(base, generation_config.FILE, optional=True) is None:
        content, as_it_is = {key: value for key, value in _ids(base).items() if value is not None}, b""
    else:
        content, as_it_is = _read(base, generation_config.FILE)
    changed, said = generation_config.mended(content)
    named = changed.get("eos_token_id")
    if set(stop_ids) != set(named if isinstance(named, list) else [named]):
        changed = changed | {"eos_token_id": stop_ids if len(stop_ids) > 1 else next(iter(stop_ids), None)}
    return (as_it_is if changed == content and as_it_is else atomic.as_json(changed)), said


def _ids(base: Base) -> dict[str, Any]:
    text_config = base.config.get_text_config()
    return {key: getattr(text_config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _others(base: Base) -> dict[str, bytes]:
    """Return what a base has besides; of a repository on the hub, what is known by its name."""
    found = small_files(base, KNOWN if base.revision else CARRIED)
    return {name: found[name] for name in found if not any(fnmatch(name, pattern) for pattern in LEFT)}


def _code(base: Base) -> dict[str, bytes]:
    """Return the code of a trusted base, which its config or tokenizer names: it goes along as text."""
    files = [base_file(base, name, optional=True) for name in (CONFIG, TOKENIZER_CONFIG)]
    named = [read_json(path)["auto_map"] for path in files if path and "auto_map" in read_json(path)]
    if not base.trust_remote_code or not named:
        return {}
    for module in set(re.findall(r"(\w+)\.\w+", json.dumps(named))):
        base_file(base, f"{module}.py", optional=True)  # which downloads it
    return small_files(base, ("*.py",))


def _read(base: Base, name: str) -> tuple[dict[str, Any], bytes]:
    """Return the object in a file of a base, and the bytes of that. Raises ModelError."""
    path = base_file(base, name)
    if path is None:
        raise ModelError(f"--base_model {base.name}: {name} is missing; copy or download it again")
    content = require_object(path, ModelError, "copy or download it again")
    return content, read_plain_file(path)
