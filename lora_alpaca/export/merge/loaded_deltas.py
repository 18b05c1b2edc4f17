"""What adapters change of a base that transformers loads as other tensors than its files hold: the model is loaded.

The experts of a layer of Mixtral or Qwen3-MoE are many tensors in the files and few in memory, and adapters are on
the latter. These are merged in memory, and made the tensors of the files again by transformers' own conversion.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_alpaca.errors import ExportError
from lora_alpaca.export.merge.deltas import Deltas, NamesDiffer
from lora_alpaca.models.base import Base, load_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.tensor_names import TensorNames
from lora_alpaca.models.weights import TensorInfo

KEPT = 4  # tensors in memory whose parts are kept: those of one layer are asked for in turns


def open_deltas(
    adapters: Sequence[tuple[Path, float]], base: Base, infos: Mapping[str, TensorInfo]
) -> "Deltas | LoadedDeltas":
    """Return what adapters change of a base's tensors, `infos`, with the model in memory only where it has to be."""
    try:
        return Deltas(adapters, base, infos)
    except NamesDiffer:
        return LoadedDeltas(adapters, base, infos)


class LoadedDeltas:
    """What adapters change of the tensors of a base, by their names in its files, as `Deltas`, of a loaded model.

    Raises what `Deltas` raises, ModelError for a base that cannot be loaded, and ExportError where transformers does
    not make the tensors of the files again of those in memory.
    """

    def __init__(self, adapters: Sequence[tuple[Path, float]], base: Base, infos: Mapping[str, TensorInfo]):
        kinds = {info.dtype for info in infos.values() if info.dtype.is_floating_point}
        held = kinds.pop() if len(kinds) == 1 else torch.float32
        model, notes = load_base(base, DeviceSpec(torch.device("cpu"), held, 16))
        self._names = TensorNames(meta_model(base) or model, {name: info.shape for name, info in infos.items()})
        named = list(model.named_parameters(remove_duplicate=False))
        held_as = {id(tensor) for name, tensor in named if name in self._names.stored}
        once = {  # of two names of one tensor, that which the files have
            name: tensor for name, tensor in named if name in self._names.stored or id(tensor) not in held_as
        }
        there = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in once.items()}
        self._deltas = Deltas(adapters, base, there, loaded=True)
        self._tensors = {name: once[name].data for name in self._deltas.changed}
        self._memory: dict[str, str] = {}
        for memory, tensor in self._tensors.items():
            for name, part in self._names.as_stored(memory, tensor).items():
                if name not in infos or infos[name].shape != tuple(part.shape):
                    raise ExportError(f"{base.name}: {memory} is merged, and its files have no {name} of that shape")
                self._memory[name] = memory
        self.changed = set(self._memory)
        self._added = {self._names.name_for(memory): memory for memory in self._deltas.added}
        self.added = {name: self._deltas.added[memory] for name, memory in self._added.items()}
        resized = self._deltas.resized
        self.resized = {name: resized[memory] for name, memory in self._memory.items() if memory in resized}
        self.tied, self.vocabulary, self.tokens = self._deltas.tied, self._deltas.vocabulary, self._deltas.tokens
        said = f"{base.name} was loaded whole: an adapter changes what its files hold as other tensors than the model"
        self.notes = [said, *notes, *self._deltas.notes]
        self._parts: dict[tuple[str, torch.dtype], dict[str, torch.Tensor]] = {}

    def source(self, name: str) -> str:
        """Return the tensor of the base that an added tensor begins from."""
        return self._names.stored[self._deltas.source(self._added[name])]

    def merged(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor with its deltas added in fp32, rounded once to a dtype.

        Raises ExportError for NaN or infinity.
        """
        if name in self._added:
            return self._deltas.merged(self._added[name], tensor, dtype)
        memory = self._memory[name]
        if (memory, dtype) not in self._parts:
            while len(self._parts) >= KEPT:
                self._parts.pop(next(iter(self._parts)))
            merged = self._deltas.merged(memory, self._tensors[memory], dtype)
            self._parts[memory, dtype] = self._names.as_stored(memory, merged)
        return self._parts[memory, dtype][name]
