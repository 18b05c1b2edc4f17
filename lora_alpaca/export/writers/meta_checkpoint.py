"""Meta's original checkpoint of a Llama: `consolidated.NN.pth` and `params.json`, written and read.

Its files may be shards of a model that several processes run together, each with a slice of every matrix.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.errors import ExportError, LoraAlpacaError, ModelError
from lora_alpaca.export.tensors import ModelFacts, Tensors
from lora_alpaca.export.writers import meta_format
from lora_alpaca.export.writers.meta_format import (
    COMPUTED,
    EMBEDDINGS,
    HEAD,
    PARAMS,
    Sizes,
    Written,
    meta_name,
    rotated,
)
from lora_alpaca.export.writers.torch_file import STORAGES, TorchFileWriter
from lora_alpaca.models.base import MOST_PARTS, base_file
from lora_alpaca.models.weights import TensorInfo, pickled_tensors
from lora_alpaca.storage import atomic
from lora_alpaca.storage.json_files import read_json, require_object

ONE_FILE, TOKENIZER = "consolidated.00.pth", "tokenizer.model"
ORIGINAL = "original"  # the folder in which Meta's repositories on the hub keep what is not for transformers
ALONG_COLUMNS = ("o_proj", "down_proj")  # what is sliced there; norms are in every shard, the rest is sliced in rows


class MetaCheckpointWriter:
    """The `state_dict` format. Raises ExportError for a model that Meta's code cannot describe; nothing is written."""

    def __init__(self, folder: Path, facts: ModelFacts):
        self._folder, self._facts = folder, facts
        self.notes: list[str] = []
        self._infos = {name: info for name, info in facts.infos.items() if not COMPUTED.fullmatch(name)}
        self._sizes, self._params = _describe(facts, self._infos)
        self._file: TorchFileWriter | None = None

    def bytes_needed(self) -> int:
        """Return about how many bytes the files will take."""
        return sum(info.nbytes for info in self._infos.values()) + 1000 * len(self._infos)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor, in the dtype and shape of its info; what the config gives is left out."""
        if name not in self._infos:
            return
        if heads := rotated(name, self._sizes):
            tensor = meta_format.to_meta(tensor, heads)
        self._opened().write(meta_name(name), tensor)

    def finish(self) -> None:
        """Close the file, and write `params.json` and the tokenizer of SentencePiece or tiktoken, if there is one."""
        self._opened().finish()
        atomic.write(self._folder / PARAMS, atomic.as_json(self._params))
        if tokenizer := self._tokenizer():
            atomic.write(self._folder / TOKENIZER, tokenizer.read_bytes())

    def read_back(self) -> Tensors:
        """Return the tensors of what was written, by the names of transformers."""
        return MetaTensors([self._folder / ONE_FILE], self._params)

    def _tokenizer(self) -> Path | None:
        """Return Meta's tokenizer of the model; a base of Llama 3 has it in a folder, for others would misread it."""
        base, beside = self._facts.base, self._facts.companions / TOKENIZER
        if beside.is_file() or base.vocabulary != self._sizes.vocabulary:
            return beside if beside.is_file() else None
        return base_file(base, f"{ORIGINAL}/{TOKENIZER}", optional=True)

    def _opened(self) -> TorchFileWriter:
        if self._file is None:
            names = {meta_name(name): info for name, info in self._infos.items()}
            tied = {meta_name(HEAD): meta_name(EMBEDDINGS)} if HEAD not in self._infos else {}
            self._file = TorchFileWriter(self._folder / ONE_FILE, names, tied)
        return self._file


def _describe(facts: ModelFacts, infos: Mapping[str, TensorInfo]) -> tuple[Sizes, dict[str, Any]]:
    """Return the sizes of a model, and what `params.json` says of it. Raises ExportError."""
    config = facts.base.config.get_text_config()
    settings = read_json(facts.companions / "config.json") or config.to_dict()
    theta, factor, other = meta_format.rope_of(settings)
    tied = HEAD not in infos
    reasons = {
        f"a {config.model_type} model": config.model_type != "llama",
        "biases": bool(settings.get("attention_bias") or settings.get("mlp_bias")),
        f"{settings.get('hidden_act')} in its layers": settings.get("hidden_act", "silu") != "silu",
        other: bool(other),
        f"rope scaled by {factor}": factor is not None and factor != meta_format.scaling_factor(tied),
        "tensors in 8 or 4 bits": any(info.dtype not in STORAGES for info in infos.values()),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ExportError(f"--format state_dict: Meta's checkpoints have no {reason}; write it as hf or gguf")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    shapes = {name: info.shape for name, info in infos.items()}
    sizes = _sizes(shapes, config.hidden_size, config.num_hidden_layers, heads, kv_heads)
    if wrong := _difference(sizes, shapes):
        raise ExportError(f"--format state_dict: Meta's checkpoints have no {wrong}; write it as hf or gguf")
    return sizes, meta_format.params_of(sizes, settings.get("rms_norm_eps", 1e-6), theta, factor is not None)


def _sizes(shapes: Mapping[str, tuple[int, ...]], dim: int, layers: int, heads: int, kv_heads: int) -> Sizes:
    """Return the sizes of a model: of vocabulary and hidden layer those of its tensors, 1 where they are missing."""
    vocabulary, hidden = (shapes.get(name, (1,))[:1] for name in (EMBEDDINGS, "model.layers.0.mlp.gate_proj.weight"))
    return Sizes(dim, layers, heads, kv_heads, *(hidden or (1,)), *(vocabulary or (1,)))


def _difference(sizes: Sizes, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the first tensor that is not what the sizes say, or that they do not know, empty if there is none."""
    expected = sizes.shapes(tied=HEAD not in shapes)
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            if not shapes[name]:
                return f"slices of {name} that do not fit together"
            return f"{name} of {list(shapes[name])}, where {list(shape)} belongs"
    if missing := [name for name in expected if name not in shapes]:
        return f"model without {missing[0]}"
    return next((name for name in shapes if name not in expected), "")


class MetaTensors:
    """The tensors of Meta's files by the names of transformers, mapped, each put together of its slices when read.

    `tied` is whether the head is the embeddings. Raises ModelError for files that are not those of one Llama.
    """

    def __init__(self, files: Sequence[Path], params: Mapping[str, Any]):
        Written.require(params, files[0].with_name(PARAMS), ModelError, "copy it again")
        self._folder, self._shards = files[0].parent, [_tensors(path) for path in files]
        self._dim = dim = params["dim"]
        layers, heads, kv_heads = params["n_layers"], params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
        if not (0 < layers <= MOST_PARTS and 0 < kv_heads <= heads <= dim) or dim % heads or heads % kv_heads:
            raise ModelError(
                f"{self._folder / PARAMS}: {dim} values in {heads} heads do not fit together; copy it again"
            )
        self._names = self._found(layers)
        shapes = {name: self._shape(name) for name in self._names}
        self.sizes = _sizes(shapes, dim, layers, heads, kv_heads)
        if wrong := _difference(self.sizes, shapes):
            raise ModelError(f"{self._folder}: {PARAMS} and the files do not describe one Llama: {wrong}")
        self.tied = HEAD not in self._names
        self.infos = {name: TensorInfo(self._slices(name)[0].dtype, shapes[name]) for name in self._names}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor: a view of the file if it is whole there, else a new one."""
        slices = self._slices(name)
        if slices[0].ndim == 1:
            if any(not torch.equal(slices[0], other) for other in slices[1:]):
                raise ModelError(f"{self._folder}: the shards differ in {meta_name(name)}; they are not of one model")
            tensor = slices[0]
        else:
            tensor = slices[0] if len(slices) == 1 else torch.cat(slices, self._along(name))
        heads = rotated(name, self.sizes)
        return meta_format.from_meta(tensor, heads) if heads else tensor

    def _found(self, layers: int) -> list[str]:
        """Return the names of the tensors in their order. Raises ModelError for a tensor that no Llama has."""
        names = {meta_name(name): name for name in Sizes(1, layers, 1, 1, 1, 1).shapes(tied=False)}
        for number, shard in enumerate(self._shards):
            unknown = sorted(name for name in shard if name not in names and not COMPUTED.fullmatch(name))
            if unknown:
                raise ModelError(f"{self._folder}: {unknown[0]} is no tensor of a Llama; not converted")
            if absent := [name for name in self._shards[0] if name not in shard and name in names]:
                raise ModelError(f"{self._folder}: shard {number} lacks {absent[0]}; copy it again")
        first = self._shards[0]
        head, embeddings = first.get(meta_name(HEAD)), first.get(meta_name(EMBEDDINGS))
        shared = head is not None and embeddings is not None and head.data_ptr() == embeddings.data_ptr()
        return [name for meta, name in names.items() if meta in first and not (name == HEAD and shared)]

    def _slices(self, name: str) -> list[torch.Tensor]:
        return [shard[meta_name(name)] for shard in self._shards]

    def _along(self, name: str) -> int:
        """Return the dimension that a matrix is sliced along; embeddings were sliced in columns before Llama 3."""
        if name == EMBEDDINGS:
            return 0 if self._slices(name)[0].shape[-1] == self._dim else 1
        return 1 if name.split(".")[-2] in ALONG_COLUMNS else 0

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, empty where its slices do not fit together."""
        slices = self._slices(name)
        ndim, along = slices[0].ndim, self._along(name)
        rests = {(part.dtype, part.shape[:along] + part.shape[along + 1 :]) for part in slices}
        if ndim == 1 or len(rests) > 1 or slices[0].dtype not in STORAGES:
            return tuple(slices[0].shape) if len(rests) == 1 and ndim == 1 else ()
        shape = list(slices[0].shape)
        shape[along] = sum(part.shape[along] for part in slices)
        return tuple(shape)


def checkpoint_files(folder: Path, error: type[LoraAlpacaError] = ModelError) -> list[Path]:
    """Return the files of a checkpoint in the order of their numbers. Raises an error where one is missing."""
    files = sorted(folder.glob(meta_format.FILES))
    expected = [f"consolidated.{number:02}.pth" for number in range(len(files))]
    if not files or [path.name for path in files] != expected:
        missing = next((name for name in expected if not (folder / name).is_file()), ONE_FILE)
        raise error(f"{folder}: {missing} is missing; copy or download the checkpoint again")
    return files


def read_params(folder: Path) -> dict[str, Any]:
    """Return the content of `params.json`. Raises ModelError."""
    params = require_object(folder / PARAMS, ModelError, "copy or download the checkpoint again")
    return params["model"] if isinstance(params.get("model"), dict) else params


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return pickled_tensors(path)
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from None
