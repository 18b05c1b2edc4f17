"""What an export passes on: the tensors of a model, one at a time, and the writers that take them.

    files of the base -> Tensors -> MergedTensors -> a Writer for each format -> Tensors, read back for the receipt

Tensors have the names of the base's files, whatever a format calls them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_alpaca.models.base import Base
from lora_alpaca.models.weights import TensorInfo
from lora_alpaca.prompts import AnyTemplate


class Tensors(Protocol):
    """The tensors of a model by their names in the base's files, each read when it is asked for."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Return name -> dtype and shape, in the order in which they are best read."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU. It may be a view of a file, and is not written to."""
        ...


@dataclass(frozen=True)
class ModelFacts:
    """What the writers know of the model that goes out.

    `companions` is a folder with the small files as they go out: `config.json`, generation config, tokenizer, chat
    template. `infos` are the tensors that will be written, in order. `tied` is whether the head is the embeddings.
    `template` is bound to the tokenizer.
    """

    base: Base
    tokenizer: Any
    template: AnyTemplate
    stop_ids: list[int]
    companions: Path
    infos: Mapping[str, TensorInfo]
    tied: bool


class Writer(Protocol):
    """Writes a model in one format into an empty folder: every tensor of the facts once, in their order.

    `notes` are sentences for the user, once it is finished.
    """

    notes: list[str]

    def bytes_needed(self) -> int:
        """Return about how many bytes the files will take."""
        ...

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor, in the dtype and shape of its info."""
        ...

    def finish(self) -> None:
        """Close the files, and write the small ones."""
        ...

    def read_back(self) -> Tensors:
        """Return the tensors of what was written, by the base's names, dequantised where the format quantises."""
        ...
