"""A finetuned model published as its difference from its base, and recovered from both, bit for bit.

Weights that may not be passed on are so made useless to whoever has no base of their own. What is stored of a tensor is
the exclusive or of its bits with those of the base's tensor: the same operation brings it back, and rounds nothing.
Rows that the finetuned model has more, as of added tokens, and tensors that the base has none of are stored as they
are. Tensors are read from mapped files and written one at a time; each is checked by its sha256 when it comes back.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.config import WeightDiffConfig
from lora_alpaca.errors import FolderError, ModelError, visible
from lora_alpaca.export.disk import require_space
from lora_alpaca.export.progress import counting_bytes
from lora_alpaca.models.base import INDEX, ONE_FILE, Base, base_file, locate_base, weight_files
from lora_alpaca.models.fingerprint import hash_base
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.shards import NAMES, Shards, ShardWriter, as_bytes
from lora_alpaca.models.small_files import CONFIGS, TOKENIZER, small_files
from lora_alpaca.models.weights import DTYPES, TensorInfo, weights_damage
from lora_alpaca.storage import atomic
from lora_alpaca.storage.json_files import Shape, read_json
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import user_path

FOLDER, FACTS = "weight_diff", "weight_diff.json"  # of the differences, which no program is to take for weights
CARRIED = (*CONFIGS, *TOKENIZER, "LICENSE*", "NOTICE*", "prompt_contract.json")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class _TensorFacts(Shape):
    """What a tensor of the finetuned model is: dtype as safetensors names it, and sha256 of its bytes."""

    dtype: str
    sha256: str


class _Facts(Shape):
    """The content of `weight_diff.json`."""

    base_model: str
    base_sha256: str
    tensors: dict[str, _TensorFacts]


@dataclass
class _Written:
    """What was written: tensors, their bytes, and the names of those with rows of their own, or wholly their own."""

    tensors: int = 0
    size: int = 0
    grown: int = 0
    whole: int = 0

    def __str__(self) -> str:
        parts = [f"{self.tensors} tensors ({gigabytes(self.size)})"]
        parts += [f"{self.grown} of them with more rows than the base's"] * bool(self.grown)
        parts += [f"{self.whole} of them not in the base, and stored as they are"] * bool(self.whole)
        return ", ".join(parts)


def weight_diff(config: WeightDiffConfig) -> Path:
    """Write the difference of a finetuned model from its base, or the model that base and difference make.

    Returns the new folder. Raises ModelError where the two do not belong together, or a tensor comes out otherwise than
    it was, and FolderError where the new folder exists already or its disk is full. Then nothing is written.
    """
    new = user_path(config.target)
    if new.exists() or new.is_symlink():
        raise FolderError(f"{new} is there already, and is not written over; name another folder")
    base = locate_base(config.base, flag="BASE")
    if config.action == "make":
        return _make(base, locate_base(config.source, flag="TUNED"), new, config.max_shard_size)
    difference = locate_base(config.source, flag="DIFF")
    if (facts := base_file(difference, FACTS)) is None:
        return _add(base, difference, new, config.max_shard_size)
    return _recover(base, difference, facts, new, config.max_shard_size)


def _make(base: Base, tuned: Base, new: Path, most: int) -> Path:
    own, theirs = Shards(weight_files(tuned)), Shards(weight_files(base))
    _require_related(own, theirs, "TUNED", tuned.name, base.name)
    infos = {name: TensorInfo(INTEGERS[info.dtype.itemsize], info.shape) for name, info in own.infos.items()}
    name = base.name if base.revision else Path(base.name).name  # the path of a folder is nobody's business
    facts: dict[str, Any] = {"base_model": name, "base_sha256": hash_base(base), "tensors": {}}

    def differences() -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in own.infos.items():
            tensor = own.read(name)
            digest = hashlib.sha256(as_bytes(tensor)).hexdigest()
            facts["tensors"][name] = {"dtype": NAMES[info.dtype], "sha256": digest}
            yield name, _mixed(tensor, info.dtype, theirs.read(name) if name in theirs.infos else None)

    files = small_files(tuned, CARRIED)
    folder = OutputFolder(new)
    require_space(str(new), new, "the difference", sum(info.nbytes for info in infos.values()))
    with folder.staging() as stage:
        (stage / FOLDER).mkdir()
        _write(stage / FOLDER, infos, differences(), most, "taking the difference")
        _finish(folder, stage, files | {FACTS: atomic.as_json(facts)})
    print(f"{_described(own, theirs)} of {tuned.name}, as their difference from {base.name}, written to {new}")
    return new


def _recover(base: Base, difference: Base, facts: Path, new: Path, most: int) -> Path:
    recorded = read_json(facts)
    _Facts.require(recorded, facts, ModelError, "copy or download it again")
    tensors: dict[str, dict[str, str]] = recorded["tensors"]
    bits, theirs = Shards(_difference_files(difference)), Shards(weight_files(base))
    if bits.infos.keys() != tensors.keys() or not all(one["dtype"] in DTYPES for one in tensors.values()):
        raise ModelError(f"DIFF {difference.name}: {FACTS} and its tensors do not agree; copy or download it again")
    infos = {name: TensorInfo(DTYPES[tensors[name]["dtype"]], info.shape) for name, info in bits.infos.items()}
    is_recorded = hash_base(base) == recorded["base_sha256"]

    def recovered() -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in infos.items():
            _require_rows(name, info, theirs, "DIFF", difference.name, base.name)
            other = theirs.read(name) if name in theirs.infos else None
            tensor = _mixed(bits.read(name), info.dtype, other).view(info.dtype)
            if hashlib.sha256(as_bytes(tensor)).hexdigest() != tensors[name]["sha256"]:
                whose = "DIFF is damaged" if is_recorded else f"it is not the base of DIFF, {recorded['base_model']}"
                raise ModelError(f"BASE {base.name}: {name} comes out otherwise than it was (its sha256): {whose}")
            yield name, tensor

    _write_model(difference, new, infos, recovered(), most)
    print(f"{_described(bits, theirs)} written to {new}, each as it was (sha256)")
    return new


def _add(base: Base, difference: Base, new: Path, most: int) -> Path:
    """Write base + difference of floats, as Stanford Alpaca published one.

    Rows that were added to an embedding began as the mean of the others, there.
    """
    floats, theirs = Shards(weight_files(difference)), Shards(weight_files(base))
    for name, info in floats.infos.items():
        if name not in theirs.infos:
            raise ModelError(f"DIFF {difference.name}: {name} is not in BASE {base.name}; it is another model's")
        if not info.dtype.is_floating_point:
            raise ModelError(f"DIFF {difference.name}: {name} is {NAMES[info.dtype]}, no difference of floats")

    def sums() -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in floats.infos.items():
            _require_rows(name, info, theirs, "DIFF", difference.name, base.name)
            before = theirs.read(name).float()
            if info.shape and (more := info.shape[0] - len(before)) > 0:
                before = torch.cat([before, before.mean(0, keepdim=True).expand(more, *before.shape[1:])])
            before = before[: info.shape[0]] if info.shape else before
            yield name, (floats.read(name).float() + before).to(info.dtype)

    _write_model(difference, new, floats.infos, sums(), most)
    print(
        f"{len(floats.infos)} tensors written to {new}: {difference.name} is a difference of floats, so the sums are "
        "rounded, and there is no sha256 to check them by"
    )
    return new


def _mixed(tensor: torch.Tensor, dtype: torch.dtype, other: torch.Tensor | None) -> torch.Tensor:
    """Return the exclusive or of the bits of a tensor and of another in a dtype, row by row, as integers."""
    integer = INTEGERS[dtype.itemsize]
    bits = tensor.contiguous().view(integer)
    if other is None:
        return bits
    other = other.to(dtype).contiguous().view(integer)
    if other.shape == bits.shape:
        return bits ^ other
    rows = min(len(bits), len(other))
    return torch.cat([bits[:rows] ^ other[:rows], bits[rows:]])


def _require_related(own: Shards, theirs: Shards, flag: str, name: str, base: str) -> None:
    """Raise ModelError unless the tensors of a model are those of a base, but for their rows."""
    if not own.infos.keys() & theirs.infos.keys():
        raise ModelError(
            f"{flag} {name} and BASE {base} have no tensor in common; name the model it was finetuned from"
        )
    for tensor, info in own.infos.items():
        _require_rows(tensor, info, theirs, flag, name, base)


def _require_rows(tensor: str, info: TensorInfo, theirs: Shards, flag: str, name: str, base: str) -> None:
    """Raise ModelError for a tensor that differs from the base's in more than the number of its rows."""
    if tensor not in theirs.infos:
        return
    shape, other = info.shape, theirs.infos[tensor].shape
    if shape != other and (len(shape) != len(other) or shape[1:] != other[1:]):
        raise ModelError(
            f"{flag} {name}: {tensor} is {list(shape)}, and {list(other)} in BASE {base}; it is another model's"
        )


def _described(own: Shards, theirs: Shards) -> _Written:
    shared = own.infos.keys() & theirs.infos.keys()
    grown = sum(own.infos[name].shape != theirs.infos[name].shape for name in shared)
    size = sum(info.nbytes for info in own.infos.values())
    return _Written(len(own.infos), size, grown, len(own.infos) - len(shared))


def _difference_files(difference: Base) -> list[Path]:
    """Return the files of differences, downloaded if they are not here yet. Raises ModelError for one that is not."""
    names = [f"{FOLDER}/{ONE_FILE}"]
    if index := base_file(difference, f"{FOLDER}/{INDEX}"):
        placed = read_json(index).get("weight_map")
        found = sorted(set(placed.values())) if isinstance(placed, dict) else []
        if not found or not all(isinstance(name, str) and Path(name).name == name for name in found):
            raise ModelError(f"{index}: does not say which file has which tensor; copy or download it again")
        names = [f"{FOLDER}/{name}" for name in found]
    paths = []
    for name in names:
        path = base_file(difference, name)
        reason = "is missing" if path is None else weights_damage(path)
        if path is None or reason:
            raise ModelError(f"DIFF {difference.name}: {visible(name)} {reason}")
        paths.append(path)
    return paths


def _write_model(
    difference: Base, new: Path, infos: dict[str, TensorInfo], tensors: Iterator[tuple[str, torch.Tensor]], most: int
) -> None:
    require_space(str(new), new, "the model", sum(info.nbytes for info in infos.values()))
    files = small_files(difference, CARRIED)
    folder = OutputFolder(new)
    with folder.staging() as stage:
        _write(stage, infos, tensors, most, "recovering")
        _finish(folder, stage, files)


def _write(
    folder: Path, infos: dict[str, TensorInfo], tensors: Iterator[tuple[str, torch.Tensor]], most: int, what: str
) -> None:
    writer = ShardWriter(folder, infos, most)
    with counting_bytes(sum(info.nbytes for info in infos.values()), what) as advance:
        for name, tensor in tensors:
            writer.write(name, tensor)
            advance(tensor.nbytes)
    writer.finish()


def _finish(folder: OutputFolder, stage: Path, files: dict[str, bytes]) -> None:
    """Write the small files of a model, and let all appear."""
    for name, content in files.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        atomic.write(stage / name, content)
    atomic.fsync_tree(stage)
    folder.publish(stage, overwrite=False)
