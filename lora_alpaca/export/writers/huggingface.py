"""The `hf` format: safetensors files beside the companions, as transformers, vLLM, SGLang and TGI load them."""

from pathlib import Path

import torch

from lora_alpaca.export.tensors import ModelFacts, Tensors
from lora_alpaca.models.shards import Shards, ShardWriter


class HuggingFaceWriter:
    """Writes a model as safetensors files of at most so many bytes; the companions are there already."""

    def __init__(self, folder: Path, facts: ModelFacts, max_shard_size: int):
        self.folder, self._facts = folder, facts
        self.notes: list[str] = []
        self._shards = ShardWriter(folder, facts.infos, max_shard_size)

    def bytes_needed(self) -> int:
        """Return how many bytes the files will take."""
        return sum(info.nbytes for info in self._facts.infos.values())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        self._shards.write(name, tensor)

    def finish(self) -> None:
        """Close the files, and write the index where there are several."""
        self._shards.finish()

    def read_back(self) -> Tensors:
        """Return the tensors that were written."""
        return Shards([self.folder / name for name in self._shards.files])

    @property
    def file_hashes(self) -> dict[str, str]:
        """Return file -> sha256."""
        return self._shards.file_hashes
