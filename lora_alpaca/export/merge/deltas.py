"""What adapters change of the tensors of a base: each is merged as it is read, in fp32, and rounded once."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.errors import ExportError
from lora_alpaca.models.adapter_layers import AdapterLayers, embedding_names
from lora_alpaca.models.base import Base
from lora_alpaca.models.changes import Change, NotFinite, Rows, Rule, Whole, merged
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.tensor_names import TensorNames
from lora_alpaca.models.weights import TensorInfo


class NamesDiffer(ExportError):
    """A tensor that an adapter changes is not in the base's files as the model has it; the model has to be loaded."""


class Weighted(NamedTuple):
    """A change of a tensor, what it is multiplied by, and the adapter that makes it."""

    change: Change
    weight: float
    folder: Path


class Deltas:
    """What adapters, each with a weight, change of the tensors of a base, by their names in the base's files.

    `infos` are the tensors of those files. `changed` are the names of those that become others, `added` the tensors
    that the files do not have, in the base's dtype, and `resized` those that get other rows, of which there are then
    `vocabulary`. `tied` is whether head and embeddings are one in the result, `tokens` are those whose embeddings were
    trained by themselves.

    Raises AdapterError for an adapter that does not fit the base, ExportError for what cannot be merged, and
    NamesDiffer where the files do not have what is changed as the model has it. With `loaded`, names and infos are not
    those of the files, but of the model.
    """

    def __init__(
        self,
        adapters: Sequence[tuple[Path, float]],
        base: Base,
        infos: Mapping[str, TensorInfo],
        loaded: bool = False,
    ):
        self.notes: list[str] = []
        self.added: dict[str, TensorInfo] = {}
        self.resized: dict[str, TensorInfo] = {}
        self.vocabulary: int | None = None
        self._infos, self._sources, self._changes = infos, dict[str, str](), dict[str, list[Weighted]]()
        bare = meta_model(base)
        if bare is None:
            raise NamesDiffer(f"{base.name}: its own code does not build it without its weights, as merging needs")
        self._names = TensorNames(bare, {name: info.shape for name, info in infos.items()}, loaded)
        embeddings = embedding_names(bare)
        self.tied = len(embeddings) > 1 and len({id(bare.get_parameter(name)) for name in embeddings}) == 1
        found = self._read(adapters, base)
        for name, changes in found.items():
            if not self.tied or name not in embeddings:
                self._changes[self._stored(name)] = [*_kept(changes), *_made(changes)]
        if self.tied:
            self._read_tied(sorted(embeddings), found)
        for name, changes in self._changes.items():
            _require_sum(name, changes)
            self._resize(name, changes)
        self._require_vocabulary(embeddings)
        self.changed = self._changes.keys() & infos.keys()
        rows = [change for changes in self._changes.values() for change, *_ in changes if isinstance(change, Rows)]
        self.tokens = sorted({token for change in rows for token in change.numbers.tolist()})

    def source(self, name: str) -> str:
        """Return the tensor of the base that an added tensor begins from."""
        return self._sources[name]

    def merged(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor with its deltas added in fp32, rounded once to a dtype.

        Raises ExportError for NaN or infinity.
        """
        changes = self._changes[name]
        try:
            return merged(tensor, [(change, weight) for change, weight, _ in changes], dtype)
        except NotFinite:
            raise ExportError(f"{name} holds NaN or infinity once the adapter is merged into it") from None
        except (ValueError, RuntimeError) as error:
            folders = " and ".join(dict.fromkeys(str(folder) for *_, folder in changes))
            raise ExportError(f"{folders}: {name} cannot be merged ({str(error).splitlines()[0]})") from None

    def _read(self, adapters: Sequence[tuple[Path, float]], base: Base) -> dict[str, list[Weighted]]:
        """Return name in memory -> changes by all adapters."""
        found: dict[str, list[Weighted]] = {}
        for folder, weight in adapters:
            tensors = adapter_folder.read_weights(folder)
            layers = AdapterLayers(meta_model(base), folder, tensors, f"{folder} on {base.name}")
            for name, changes in layers.changes.items():
                found.setdefault(name, []).extend(Weighted(change, weight, folder) for change in changes)
        return found

    def _stored(self, name: str) -> str:
        """Return the name that a tensor in memory has in the base's files."""
        if name not in self._names.stored:
            raise NamesDiffer(f"{name} is not in the base's files as the model has it")
        return self._names.stored[name]

    def _read_tied(self, embeddings: Sequence[str], found: Mapping[str, list[Weighted]]) -> None:
        """Take over the changes of embeddings and head that are one in the base, and may come apart."""
        stored = [name for name in embeddings if name in self._names.stored]
        if not stored:
            raise NamesDiffer(f"{embeddings[0]} is not in the base's files as the model has it")
        base = _kept([entry for name in embeddings for entry in found.get(name, [])])
        own = {name: _made(found.get(name, [])) for name in embeddings}
        first = own[embeddings[0]]
        if all(_same(first, own[name]) for name in embeddings):
            own = dict.fromkeys(stored, first)
        else:
            self.tied = False
            self.notes.append("head and embeddings are one in the base, and two in the result: one alone was trained")
        for name, changes in own.items():
            where = self._names.stored.get(name)
            if where is None:
                where, source = self._names.name_for(name), self._names.stored[stored[0]]
                self.added[where], self._sources[where] = self._infos[source], source
            if base or changes or where in self.added:
                self._changes[where] = [*base, *changes]

    def _resize(self, name: str, changes: Sequence[Weighted]) -> None:
        """Take note of a tensor with other rows than the base's: the vocabulary of the adapter's embeddings."""
        info = self.added.get(name) or self._infos[name]
        if not changes or not isinstance(whole := changes[0].change, Whole) or whole.tensor.shape == info.shape:
            return
        shape = tuple(whole.tensor.shape)
        if name in self.added:
            self.added[name] = info._replace(shape=shape)
        else:
            self.resized[name] = info._replace(shape=shape)
        self.vocabulary = shape[0]

    def _require_vocabulary(self, embeddings: Collection[str]) -> None:
        """Raise ExportError if embeddings and head would be for another number of tokens than each other."""
        for name in embeddings if self.vocabulary else []:
            stored = self._names.stored.get(name) or self._names.name_for(name)
            info = self.added.get(stored) or self.resized.get(stored) or self._infos.get(stored)
            if info is not None and info.shape[0] != self.vocabulary:
                raise ExportError(
                    f"{name} is for {info.shape[0]} tokens, and the adapter for {self.vocabulary}, whose rows it does "
                    "not hold; save it with save_embedding_layers=True of PEFT"
                )


def _is_kept(entry: Weighted) -> bool:
    return isinstance(entry.change, Whole) and not entry.change.trained


def _kept(changes: Sequence[Weighted]) -> list[Weighted]:
    """Return the tensor of the base that adapters keep beside them, if they do. Raises ExportError for two others."""
    found = [entry for entry in changes if _is_kept(entry)]
    for entry in found:
        if not _same_change(entry.change, found[0].change):
            raise ExportError(f"{entry.folder} and {found[0].folder} keep embeddings that differ: that is no sum")
    return found[:1]


def _made(changes: Sequence[Weighted]) -> list[Weighted]:
    """Return the changes that were trained."""
    return [entry for entry in changes if not _is_kept(entry)]


def _same(one: Sequence[Weighted], other: Sequence[Weighted]) -> bool:
    """Return whether changes are the same, to the bit."""
    return len(one) == len(other) and all(
        a.weight == b.weight and _same_change(a.change, b.change) for a, b in zip(one, other, strict=True)
    )


def _same_change(one: Change, other: Change) -> bool:
    return type(one) is type(other) and all(map(_equal, vars(one).values(), vars(other).values()))


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def _require_sum(name: str, changes: Sequence[Weighted]) -> None:
    """Raise ExportError for what is no sum, and has to be: a change by several adapters, or a weighted one."""
    several = len({folder for *_, folder in changes}) > 1
    for change, weight, folder in changes:
        what = ""
        if isinstance(change, (Rows, Whole)) and (isinstance(change, Rows) or change.trained):
            what = "was trained itself"
        elif isinstance(change, Rule) and not change.adds:
            what = f"is changed by the rule of {change.kind}"
        if what and several:
            raise ExportError(f"{folder}: {name} {what}, and another adapter changes it, too: that is no sum")
        if what and weight != 1:
            raise ExportError(f"--adapter_weights {weight:g}: {folder}: {name} {what}, which is not weighted")
