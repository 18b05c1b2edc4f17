"""What a writer of a format is given: the tensors of a folder, and what is known of its model."""

from pathlib import Path
from typing import Any

import torch

from lora_alpaca.export.tensors import ModelFacts
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.shards import Shards


def facts_of(folder: Path) -> tuple[ModelFacts, Shards]:
    """Return the facts of a model, whose companions are its own files, and its tensors."""
    base = locate_base(str(folder))
    tensors = Shards(sorted(folder.glob("*.safetensors")))
    none: Any = None
    tied = bool(base.config.tie_word_embeddings)
    return ModelFacts(base, none, none, [], folder, tensors.infos, tied), tensors


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder's safetensors files."""
    tensors = Shards(sorted(folder.glob("*.safetensors")))
    return {name: tensors.read(name) for name in tensors.infos}
