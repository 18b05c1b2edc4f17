"""What a config names, loaded: the base with its adapters, and the text side of each."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lora_alpaca.artifacts.source import ModelSource, open_source
from lora_alpaca.config import GenerateConfig
from lora_alpaca.errors import AdapterError, ConfigError, visible
from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.attaching import attach
from lora_alpaca.inference.codec import Codec
from lora_alpaca.inference.layers import kernels, products, steps
from lora_alpaca.inference.sampling import BASE
from lora_alpaca.models.base import load_base
from lora_alpaca.models.device import as_stored, choose_device
from lora_alpaca.planning.preflight import check_base_fits
from lora_alpaca.storage.paths import user_path


class Loaded(NamedTuple):
    """A model with its adapters, the codec of each by name (the first is the default), and its longest context."""

    adapters: Adapters
    codecs: dict[str, Codec]
    max_length: int | None
    base_name: str


def load(config: GenerateConfig) -> Loaded:
    """Return what a config names, and print notes on stderr.

    Raises ConfigError, ModelError, AdapterError, TemplateError or ContractError, in one line each.
    """
    sources = open_sources(config)
    base = next(iter(sources.values())).base
    log(note for source in sources.values() for note in source.notes)
    spec, notes = choose_device(config)
    log(notes)
    spec, notes = as_stored(spec, base.config, base.name, config)
    log(notes)
    check_base_fits(base, spec)
    log(note for source in sources.values() for note in source.verify())
    texts = {name: source.load_tokenizer() for name, source in sources.items()}
    log(note for *_, notes in texts.values() for note in notes)
    model, notes = load_base(base, spec)
    log(notes)
    functions = kernels.Functions()
    if spec.device.type == "cpu" and spec.bits != 16:
        products.put_in(model, functions)
    ends, rows = model.generation_config.eos_token_id, int(model.get_input_embeddings().weight.shape[0])
    codecs = {name: Codec(tokenizer, template, ends, rows) for name, (tokenizer, template, _) in texts.items()}
    codecs.setdefault(BASE, next(iter(codecs.values())))
    folders = {name: source.adapter for name, source in sources.items() if source.adapter is not None}
    adapters, note = attach(model, base, spec, folders, config.merge_adapter)
    log([note] if note else [])
    steps.put_in(adapters, functions)
    return Loaded(adapters, codecs, base.max_length, base.name)


def open_sources(config: GenerateConfig) -> dict[str, ModelSource]:
    """Return the adapters of a config, each with its base, by the names they answer to; `BASE` alone without one.

    Raises ConfigError for two of one name, AdapterError for adapters of several bases.
    """
    whole = config.lora_weights
    several = "," in whole and not user_path(whole).exists()
    asked = [name.strip() for name in whole.split(",") if name.strip()] if several else [whole]
    found: dict[str, ModelSource] = {}
    for one in asked or [""]:
        source = open_source(config.base_model, one, config.revision, config.prompt_template, config.trust_remote_code)
        name = _name(one, source.adapter)
        if source.adapter is None and several:
            raise ConfigError(f"--lora_weights {whole}: {one} is no adapter; `{BASE}` can be asked for in any case")
        if source.adapter is not None and name == BASE:
            raise ConfigError(f"--lora_weights {one}: `{BASE}` means the model without an adapter; rename the folder")
        if name in found:
            raise ConfigError(
                f"--lora_weights {whole}: two adapters are named {name}, and are asked for by name; rename a folder"
            )
        found[name] = source
    if len({(source.base.path, source.base.revision) for source in found.values()}) > 1:
        bases = " and ".join(dict.fromkeys(source.base.name for source in found.values()))
        raise AdapterError(f"--lora_weights {whole}: adapters on different bases, {bases}; name those of one")
    return found


def _name(asked: str, adapter: Path | None) -> str:
    """Return the name of an adapter: that of its folder, or of its repository on the hub."""
    if adapter is None:
        return BASE
    return adapter.resolve().name if not asked or user_path(asked).exists() else asked.rpartition("/")[2]


def log(notes: Iterable[str]) -> None:
    """Print notes for the user, each once."""
    for note in dict.fromkeys(notes):
        print(visible(note), file=sys.stderr)
