"""GGUF files, which llama.cpp, Ollama and LM Studio load: `writer` writes a model, `lora` an adapter alone.

`architectures` has the names and forms of tensors, `vocabulary` the tokenizer. The package gguf, which quantises and
writes, is imported by these modules alone; `require_package` says how to install it.
"""

import importlib.util
import logging

from lora_alpaca.errors import ConfigError


def require_package() -> None:
    """Raise ConfigError where the package gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError('--format gguf needs the package gguf: pip install "lora-alpaca[gguf]"')


logging.getLogger("gguf").setLevel(logging.ERROR)  # it warns of what it makes of the tokenizer's files, and we decide
