"""Layers that recompute their activations: the same in evaluation mode, in which there is no dropout."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from lora_alpaca.engine.patches import set_until


@contextmanager
def recomputed_in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Within this context, the layers of a model in evaluation mode keep as little for the backward as in training.

    The library recomputes a layer where its flag `training` is set, which would turn on dropout too: the flag is set
    for the question alone, and not for what the layer computes.
    """
    with ExitStack() as undo:
        for module in model.modules():
            layer: Any = module
            is_layer = not hasattr(layer, "_set_gradient_checkpointing")  # and not the model around them
            if is_layer and getattr(layer, "gradient_checkpointing", False):
                recompute = partial(_evaluated, layer, layer._gradient_checkpointing_func)
                set_until(undo, layer, "_gradient_checkpointing_func", recompute)
                set_until(undo, layer, "training", True)
        yield


def _evaluated(layer: Any, checkpoint: Callable[..., Any], call: Callable[..., Any], *args: Any) -> Any:
    """Return what a layer computes in evaluation mode, by a function that computes it again in the backward."""

    def evaluate(*inputs: Any) -> Any:
        layer.training = False
        try:
            return call(*inputs)
        finally:
            layer.training = True

    return checkpoint(evaluate, *args)
