"""The base model that is tested: of a large one its first layers, at full width and vocabulary, without its dropout."""

import copy
from pathlib import Path
from typing import Any

import transformers

from lora_alpaca.engine import reference
from lora_alpaca.errors import ModelError
from lora_alpaca.models import quantization
from lora_alpaca.models.base import Base, as_model_error, locate_base, without_report
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.small_files import CHAT_TEMPLATES, TOKENIZER, small_files

LARGE = 100_000_000  # parameters


def tested(base: Base, folder: Path) -> tuple[Base, str]:
    """Return the model to test with, which may be written into a folder, and what it is.

    Raises ModelError for a base that is stored quantised, which nothing can be held to.
    """
    if found := quantization.stored(base.config):
        raise ModelError(
            f"--base_model {base.name} is stored quantised ({found.kind}), and the judge computes in fp64: name the "
            "model that it was quantised from"
        )
    model = None if base.trust_remote_code else meta_model(base)
    if model is None:
        return base, base.name
    layers, changed = _layers(model), []
    config = copy.deepcopy(base.config)
    if layers < config.get_text_config().num_hidden_layers:
        changed.append(f"the first {layers} of {config.get_text_config().num_hidden_layers} layers of {base.name}")
        _cut(config.get_text_config(), layers)
    if _without_dropout(config.get_text_config()):
        changed.append("without its own dropout" if changed else f"{base.name} without its own dropout")
    if not changed:
        return base, base.name
    _write(base, config, folder)
    return locate_base(str(folder)), ", ".join(changed)


def _layers(model: Any) -> int:
    """Return how many layers of a model are tested: all of a small one; every kind, and at least two, of another."""
    layers: int = model.config.get_text_config().num_hidden_layers
    if sum(parameter.numel() for parameter in model.parameters()) <= LARGE:
        return layers
    try:
        with reference.first_layers(model) as count:
            return count
    except NotImplementedError:
        return layers


def _cut(config: Any, layers: int) -> None:
    """Make a config one of the first layers; what it lists for every layer is cut too."""
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(config, key, value[:layers])
    config.num_hidden_layers = layers


def _without_dropout(config: Any) -> bool:
    """Turn off the dropout that a config sets, and return whether there was any: the judge draws no random numbers."""
    found = [key for key, value in vars(config).items() if "drop" in key and isinstance(value, float) and value > 0]
    for key in found:
        setattr(config, key, 0.0)
    return bool(found)


def _write(base: Base, config: Any, folder: Path) -> None:
    """Write the model of a config, with the weights and the tokenizer of a base, as a base of its own."""
    with as_model_error(f"--base_model {base.name}"), without_report():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base.path, revision=base.revision, config=config, dtype="auto", use_safetensors=True
        )
        model.save_pretrained(folder)
    for name, content in small_files(base, (*TOKENIZER, *CHAT_TEMPLATES)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
