"""The settings of an adapter that change what it does, in one form, so that its folder can be held against its record.

`adapter_config.json` is as much of an adapter as its weights are: another `lora_alpha` is another answer. PEFT may
write the file anew, with its keys in another order or with more of them, and the settings stay the same.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_alpaca.errors import AdapterError
from lora_alpaca.models.lora import default_settings, known_settings

PASSIVE = {  # who wrote it, where the base was, and what is of training alone
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type", "peft_version",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
UNORDERED = {"exclude_modules", "layers_to_transform", "modules_to_save", "target_modules", "target_parameters"}


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an adapter_config.json that have an effect, those that are not PEFT's defaults."""
    defaults = default_settings()
    found = {key: _plain(key, value) for key, value in settings.items() if key in defaults and key not in PASSIVE}
    return {key: value for key, value in sorted(found.items()) if value != _plain(key, defaults[key])}


def digest(settings: Mapping[str, Any]) -> str:
    """Return the sha256 of effective settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def require_same(now: Mapping[str, Any], recorded: Mapping[str, Any], sha256: str, where: Path) -> None:
    """Raise AdapterError, naming the first setting that differs, unless those of a file are the recorded ones."""
    found = effective(now)
    if digest(found) == sha256:
        return
    defaults = default_settings()
    for key in sorted(found.keys() | recorded.keys()):
        is_now, was = (settings.get(key, defaults.get(key)) for settings in (found, recorded))
        if is_now != was:
            raise AdapterError(f"{where}: {key} is {is_now!r}, and was {was!r} in training; copy the folder again")
    raise AdapterError(f"{where}: its settings are not those of training (their sha256 is another); copy it again")


def unknown(settings: Mapping[str, Any], where: Path) -> list[str]:
    """Return a warning of settings that PEFT does not know here, and that a later one may heed; empty ones are none."""
    known = known_settings(settings["peft_type"])
    found = sorted(key for key, value in settings.items() if key not in known and value)
    what = f"warning: {where}: {', '.join(map(str, found))} is not known to the PEFT that is installed, and ignored"
    return [what] if found else []


def _plain(key: str, value: Any) -> Any:
    """Return a setting as JSON has it, the same however it is written."""
    if isinstance(value, (set, list, tuple)):
        parts = [_plain("", part) for part in value]
        return sorted(parts, key=str) if key in UNORDERED else parts
    if isinstance(value, Mapping):
        return {str(name): _plain("", part) for name, part in sorted(value.items(), key=str)}
    return int(value) if isinstance(value, float) and value.is_integer() else value
