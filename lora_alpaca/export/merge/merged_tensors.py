"""The merge: the tensors of a base, those that an adapter changes with its delta, each rounded once."""

import torch

from lora_alpaca.export.merge.deltas import Deltas
from lora_alpaca.export.merge.loaded_deltas import LoadedDeltas
from lora_alpaca.export.tensors import Tensors
from lora_alpaca.models.weights import TensorInfo


class MergedTensors:
    """The tensors of a merged model, made when they are read; `dtype` is that of the floating-point ones, None as is.

    `kinds` says of every tensor what becomes of it: `copied`, `converted` to another dtype, `merged`, or `added`.
    `changed` counts the tensors, of those read so far, that the merge has made others.
    """

    def __init__(self, base: Tensors, deltas: Deltas | LoadedDeltas, dtype: torch.dtype | None = None):
        self._base, self._deltas, self._dtype = base, deltas, dtype
        known = {**base.infos, **deltas.resized, **deltas.added}
        infos = {name: info._replace(dtype=self._saved(info.dtype)) for name, info in known.items()}
        # wide ones first, as safetensors aligns them; most models have but one width
        self.infos: dict[str, TensorInfo] = dict(sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize))
        self.kinds = {name: self._kind(name) for name in self.infos}
        self.changed = 0

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, merged and rounded where the adapter changes it. Raises ExportError for NaN or infinity."""
        dtype, kind = self.infos[name].dtype, self.kinds[name]
        before = self._base.read(self._deltas.source(name) if kind == "added" else name)
        if kind in ("copied", "converted"):
            return before.to(dtype)
        merged = self._deltas.merged(name, before, dtype)
        self.changed += merged.shape != before.shape or not torch.equal(merged, before.to(dtype))
        return merged

    def _kind(self, name: str) -> str:
        if name not in self._base.infos:
            return "added"
        if name in self._deltas.changed:
            return "merged"
        return "copied" if self._base.infos[name].dtype == self.infos[name].dtype else "converted"

    def _saved(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype and dtype.is_floating_point else dtype
