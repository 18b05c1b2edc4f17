"""How the tensors of a base are called in its files, and in the model that transformers makes of them.

Often the names are the same. Some architectures are stored under other names (GPT-2 without `transformer.`, the head
of GPT-NeoX as `embed_out`), and of some transformers makes other tensors while it loads: the experts of a layer of
Mixtral are many tensors in its files, and two in memory.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
    revert_weight_conversion,
)

Shape = tuple[int, ...]


class TensorNames:
    """The names of a base's tensors in its files and in memory, of those that are the same tensors in both.

    `stored` is memory -> file, `converted` are the tensors of the files that transformers makes others of, and
    `unexpected` those that have no place in memory. `model` is the base on the meta device, `shapes` are those in the
    files. With `loaded`, they are those of a model, whose names are taken as they are.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Shape], loaded: bool = False):
        mapping = get_model_conversion_mapping(model)
        self._loaded = loaded
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._model, self._own = model, model.state_dict()
        self.stored: dict[str, str] = {}
        self.converted: list[str] = []
        self.unexpected: list[str] = []
        for name, shape in shapes.items():
            memory, conversion = self._in_memory(name)
            if conversion is not None:
                self.converted.append(name)
            elif memory in self._own and tuple(self._own[memory].shape) == tuple(shape):
                self.stored[memory] = name
            elif memory not in self._own:
                self.unexpected.append(memory)

    def _in_memory(self, name: str) -> tuple[str, str | None]:
        """Return the name in memory of a tensor of a file, and what says that it is converted, None if it is not."""
        if self._loaded:
            return name, None
        prefix = self._model.base_model_prefix
        memory, conversion = rename_source_key(name, self._renamings, self._converters, prefix, self._own)
        return memory, conversion

    def as_stored(self, memory: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors that the files have of one in memory, by their names."""
        found = revert_weight_conversion(self._model, {memory: tensor})
        return {name: part.contiguous() for name, part in found.items()}

    def name_for(self, memory: str) -> str:
        """Return the name that a tensor in memory gets in the files, where they do not have it yet."""
        if self._loaded:
            return memory
        mapping = get_model_conversion_mapping(self._model, add_legacy=False)[::-1]
        reverse = [
            entry.reverse_transform()
            for entry in mapping
            if isinstance(entry, WeightRenaming) and not isinstance(entry, PrefixChange)
        ]
        name = str(apply_renamings(memory, reverse))
        return name if self._in_memory(name) == (memory, None) else memory
