"""A GGUF file, written as the tensors come: what llama.cpp, Ollama and LM Studio load.

The layout of the file follows from the infos of the tensors, so that each is written where it belongs as soon as it
comes, a few rows at a time: an expert into its slice of the tensor that holds them all.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from lora_alpaca.errors import ConfigError, ExportError
from lora_alpaca.export.tensors import ModelFacts, Tensors
from lora_alpaca.export.writers.gguf import vocabulary
from lora_alpaca.export.writers.gguf.architectures import (
    Place,
    Places,
    add_metadata,
    architecture_of,
    extra_tensors,
    interleaved,
    notes,
)
from lora_alpaca.export.writers.ollama import MODELFILE, modelfile
from lora_alpaca.models.weights import TensorInfo

CHUNK = 2**22  # values that are quantised at a time
OF_LLAMA_CPP = {"q6_k": "Q6_K", "q5_k_m": "Q5_K_M", "q4_k_m": "Q4_K_M"}  # that llama.cpp itself quantises
ADVICE = (  # for the many architectures that llama.cpp's own converter knows
    "export with --format hf, and convert that with llama.cpp: "
    "python convert_hf_to_gguf.py FOLDER --outfile model.gguf --outtype f16"
)
_SMALL = ("q5_1", "q5_0", "q4_1", "q4_0")  # types that embeddings and head have more bits than
_WIDE = ("token_embd.weight", "output.weight")


class GgufWriter:
    """Writes a model as one GGUF file into a folder (see `Writer`). Raises ModelError, ConfigError when it is made."""

    def __init__(self, folder: Path, facts: ModelFacts, gguf_type: str = "f16"):
        self.path = folder / f"model-{gguf_type}.gguf"
        self._facts, self._type = facts, gguf_type
        if gguf_type in OF_LLAMA_CPP and importlib.util.find_spec("llama_cpp") is None:
            raise ConfigError(
                f"--gguf_type {gguf_type} needs llama.cpp: pip install llama-cpp-python; or export f16, and then "
                f"llama-quantize model-f16.gguf model-{gguf_type}.gguf {gguf_type}"
            )
        self._stored = _lossless(facts) if gguf_type in OF_LLAMA_CPP else gguf_type
        self._written = folder / f"model-{self._stored}.gguf"
        config = facts.base.config.get_text_config()
        architecture = architecture_of(facts.base, ADVICE)
        self.notes = list(notes(config))
        self._places = Places(facts.base, architecture).all(facts.infos)
        self._extra = extra_tensors(config)
        self._modelfile, said = modelfile(facts, self.path.name)
        self.notes += [*said, *vocabulary.notes(facts)]
        arch = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]]
        self._header = gguf.GGUFWriter(None, arch)
        rows = next(place.shape[0] for place in self._places.values() if place.name == _WIDE[0])
        self._layout = self._plan()
        self._add_general()
        add_metadata(self._header, config, rows)
        vocabulary.add_vocabulary(self._header, facts, rows)
        self._start = 0  # of the tensors in the file; 0: it is not there yet

    def bytes_needed(self) -> int:
        """Return about how many bytes the files will take."""
        offset, nbytes, _ = list(self._layout.values())[-1]
        vocabulary = 64 * self._facts.base.vocabulary
        twice = 1.6 if self._type in OF_LLAMA_CPP else 1
        return int((offset + nbytes) * twice) + vocabulary

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor. Raises ExportError for a value that f16 cannot hold."""
        if not self._start:
            self._begin()
        place = self._places.get(name)
        if place is None:  # llama.cpp makes it of another
            return
        offset, nbytes, kind = self._layout[place.name]
        if place.expert is not None:
            offset += place.expert * (nbytes // place.shape[0])
        with open(self._written, "r+b") as file:
            file.seek(self._start + offset)
            for rows in _chunks(tensor, place):
                file.write(_quantised(rows, kind, name).tobytes())

    def finish(self) -> None:
        """End the file, let llama.cpp quantise it if the type is one of its own, and write Ollama's Modelfile."""
        if not self._start:
            self._begin()
        offset, nbytes, _ = list(self._layout.values())[-1]
        os.truncate(self._written, self._start + _padded(offset + nbytes))
        if self._type in OF_LLAMA_CPP:
            _quantise_file(self._written, self.path, OF_LLAMA_CPP[self._type])
            self._written.unlink()
        (self.path.parent / MODELFILE).write_text(self._modelfile, encoding="utf-8")

    def read_back(self) -> Tensors:
        """Return the tensors of the file by the base's names, in fp32, as llama.cpp computes with them."""
        return GgufTensors(self.path, self._places, self._facts.infos)

    def _plan(self) -> dict[str, tuple[int, int, GGMLQuantizationType]]:
        """Return name in the file -> offset, bytes and type of a tensor, and tell them to the header."""
        layout: dict[str, tuple[int, int, GGMLQuantizationType]] = {}
        offset = 0
        shapes = {name: (tuple(tensor.shape), True) for name, tensor in self._extra.items()}
        shapes |= {place.name: (place.shape, place.fp32) for place in self._places.values()}
        for name, (shape, fp32) in shapes.items():
            kind = GGMLQuantizationType.F32 if fp32 else self._kind(name, shape)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            nbytes = math.prod(shape) // block * size
            self._header.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
            layout[name] = offset, nbytes, kind
            offset += _padded(nbytes)
        return layout

    def _kind(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """Return the type of a large tensor: f16 where its rows are no whole blocks of the type that is asked for."""
        wide = self._stored in _SMALL and name in _WIDE
        kind = GGMLQuantizationType["Q8_0" if wide else self._stored.upper()]
        return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16

    def _add_general(self) -> None:
        sizes = self._header.get_total_parameter_count()
        self._header.add_type(gguf.GGUFType.MODEL)
        self._header.add_name(Path(self._facts.base.name).name)
        self._header.add_size_label(gguf.size_label(*sizes))
        kind = {"f32": "ALL_F32"}.get(self._stored, f"MOSTLY_{self._stored.upper()}")
        self._header.add_file_type(LlamaFileType[kind])
        self._header.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def _begin(self) -> None:
        """Write everything that comes before the tensors, and the tensors that are no weights."""
        self._header.write_header_to_file(self._written)
        self._header.write_kv_data_to_file()
        self._header.write_ti_data_to_file()
        self._header.close()
        self._start = _padded(self._written.stat().st_size)
        with open(self._written, "r+b") as file:
            for name, tensor in self._extra.items():
                file.seek(self._start + self._layout[name][0])
                file.write(tensor.numpy().tobytes())


class GgufTensors:
    """The tensors of a GGUF file by the names of the base's files, dequantised (see `Tensors`)."""

    def __init__(self, path: Path, found: Mapping[str, Place], infos: Mapping[str, TensorInfo]):
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        self._places = found
        self._infos = {name: TensorInfo(torch.float32, infos[name].shape) for name in found}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Return name -> dtype, which is fp32, and shape, in the order in which they were written."""
        return self._infos

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, its rows and its values as the base has them."""
        place, stored = self._places[name], self._tensors[self._places[name].name]
        data = stored.data if place.expert is None else stored.data[place.expert]
        rows = data.reshape(-1, data.shape[-1])
        per = max(1, CHUNK // rows.shape[1])
        parts = [gguf.quants.dequantize(rows[n : n + per], stored.tensor_type) for n in range(0, len(rows), per)]
        shape = place.shape[1:] if place.expert is not None else place.shape
        tensor = torch.from_numpy(np.concatenate(parts)).reshape(shape)
        if place.heads:
            tensor = torch.empty_like(tensor).index_copy_(0, interleaved(len(tensor), place.heads), tensor)
        return (tensor.t().contiguous() if place.transposed else tensor) - place.shift


def _chunks(tensor: torch.Tensor, place: Place) -> Iterator[np.ndarray]:
    """Yield a tensor as the file has it, in fp32, a number of rows at a time: [rows, columns]."""
    tensor = tensor.t() if place.transposed else tensor
    rows = tensor.reshape(1, -1) if tensor.dim() == 1 else tensor.reshape(-1, tensor.shape[-1])
    order = interleaved(tensor.shape[0], place.heads) if place.heads else None
    if order is not None and tensor.dim() == 1:
        rows, order = rows[:, order], None
    per = max(1, CHUNK // rows.shape[1])
    for start in range(0, len(rows), per):
        part = rows[start : start + per] if order is None else rows[order[start : start + per]]
        yield (part.float() + place.shift if place.shift else part.float()).contiguous().numpy()


def _quantised(rows: np.ndarray, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    if kind == GGMLQuantizationType.F16 and np.abs(rows).max(initial=0) > torch.finfo(torch.float16).max:
        raise ExportError(f"{name} holds values that f16 cannot; write --gguf_type bf16")
    return np.asarray(gguf.quants.quantize(rows, kind))


def _padded(nbytes: int) -> int:
    return int(gguf.GGUFWriter.ggml_pad(nbytes, gguf.GGUF_DEFAULT_ALIGNMENT))


def _lossless(facts: ModelFacts) -> str:
    """Return the type that holds all weights as they are."""
    dtypes = {info.dtype for info in facts.infos.values()}
    return {frozenset({torch.bfloat16}): "bf16", frozenset({torch.float16}): "f16"}.get(frozenset(dtypes), "f32")


def _quantise_file(source: Path, target: Path, kind: str) -> None:
    """Let llama.cpp quantise a GGUF file into another. Raises ExportError."""
    import ctypes

    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(LlamaFileType[f"MOSTLY_{kind}"])
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    if failed:
        raise ExportError(f"llama.cpp could not quantise {source.name} to {kind}; export --gguf_type f16 or q8_0")
