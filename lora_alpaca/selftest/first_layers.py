"""A large base model, cut to its first layers: everything that is checked is in them, at full width and vocabulary."""

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
    if model is None or sum(parameter.numel() for parameter in model.parameters()) <= LARGE:
        return base, base.name
    try:
        with reference.first_layers(model) as count:
            pass
    except NotImplementedError:
        return base, base.name
    layers = base.config.get_text_config().num_hidden_layers
    if count == layers:
        return base, base.name
    _write(base, _cut(base.config, count), folder)
    return locate_base(str(folder)), f"the first {count} of {layers} layers of {base.name}"


def _cut(config: Any, count: int) -> Any:
    """Return a config of the first layers; what it lists for every layer is cut too."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, key, value[:count])
    text.num_hidden_layers = count
    return config


def _write(base: Base, config: Any, folder: Path) -> None:
    """Write the layers of a config, with everything around them and the tokenizer, as a base of its own."""
    with as_model_error(f"--base_model {base.name}"), without_report():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base.path, revision=base.revision, config=config, dtype="auto", use_safetensors=True
        )
        model.save_pretrained(folder)
    for name, content in small_files(base, (*TOKENIZER, *CHAT_TEMPLATES)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
