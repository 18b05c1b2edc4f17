"""Every formula in bytes and work: what a run needs, from its config, counted tokens and a model without weights."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.meta import memory_bytes

ACTIVATION_BYTES = 34  # a token, layer and unit of width, where attention keeps no score matrix (arXiv:2205.05198)
LOGIT_BYTES = 10  # a token and piece of the vocabulary: logits in 16 bits, their copy and gradient in fp32
FP32 = 4


@dataclass(frozen=True)
class ModelSize:
    """The size of a base with what is trained of it. `weights` are the bytes of the frozen base as it is held."""

    layers: int
    width: int
    vocabulary: int
    parameters: int  # of base and adapter
    trainable: int
    weights: int


@dataclass(frozen=True)
class Estimate:
    """What a run needs on one rank, in bytes, and its work, in parameters x tokens."""

    weights: int
    trainable: int  # the trained parameters and their gradients, in fp32
    optimizer: int  # AdamW's two moments
    activations: int  # of the largest pack or micro-batch
    disk: int  # checkpoints at their most, with one being written
    work: float  # over all steps


def model_size(base: Base, spec: DeviceSpec, model: Any | None, trainable: int) -> ModelSize:
    """Return the size of a base with so many trained parameters; `model` is the base on the meta device.

    Where there is no such model (code that a base brings may not run there), the sizes follow from its config alone: a
    transformer layer has about 12 width² parameters.
    """
    shape = base.config.get_text_config()
    layers, width, vocabulary = shape.num_hidden_layers, shape.hidden_size, shape.vocab_size
    if model is None:
        parameters = 12 * layers * width**2 + vocabulary * width
        weights = int(parameters * {16: 8 * spec.dtype.itemsize, 8: 8, 4: 4.5}[spec.bits] / 8)
    else:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        weights = memory_bytes(model, spec)
    return ModelSize(layers, width, vocabulary, parameters + trainable, trainable, weights)


def activation_bytes(size: ModelSize, tokens: int, keeps_logits: bool) -> int:
    """Return the bytes that the backward pass of so many tokens keeps, without recomputing activations."""
    per_token = ACTIVATION_BYTES * size.layers * size.width + LOGIT_BYTES * size.vocabulary * keeps_logits
    return tokens * per_token


def most_tokens(size: ModelSize, free: int) -> int:
    """Return how many tokens have activations that fit into so many bytes."""
    return free // (ACTIVATION_BYTES * size.layers * size.width)


def tokens_per_step(lengths: np.ndarray, batch_size: int) -> int:
    """Return the tokens of an average optimizer step, over all ranks."""
    return math.ceil(int(lengths.sum()) / len(lengths) * batch_size)


def work(size: ModelSize, tokens_a_step: int, total_steps: int, world_size: int) -> float:
    """Return the parameters x tokens that one rank computes in a run."""
    return size.parameters * tokens_a_step * total_steps / world_size


def disk_bytes(size: ModelSize, config: FinetuneConfig, total_steps: int, save_steps: int) -> int:
    """Return what a run writes at its most: checkpoints with adapter and two moments, the best one, and one staged."""
    kept = min(config.save_total_limit, total_steps // save_steps)
    return 3 * FP32 * size.trainable * (kept + 2)


def free_bytes(device: torch.device, size: ModelSize) -> int:
    """Return what will be free on a CUDA device once base, adapter, gradients and moments are on it; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - size.weights - 4 * FP32 * size.trainable)
