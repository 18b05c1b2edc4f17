"""What is trained of a model, and how that is saved: the seam between training and kinds of finetuning."""

from typing import Any, Protocol

import torch

State = dict[str, torch.Tensor]


class Trainable(Protocol):
    """The trained part of a model. `parameters` are in the model's order, and `names` are those they have in it."""

    model: Any
    names: list[str]
    parameters: list[torch.nn.Parameter]

    def state(self) -> State:
        """Return the trained tensors on the CPU, under the names that they are saved by."""

    def load_state(self, tensors: State, where: str) -> None:
        """Put tensors into the model. Raises an error, naming `where`, unless names and shapes are its own."""

    def config(self) -> dict[str, Any]:
        """Return what is saved beside the tensors, so that they can be loaded."""
