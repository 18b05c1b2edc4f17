"""Every formula in bytes and work: what a run needs, from its config, counted tokens and a model without weights.

Memory is counted for one rank, by part. A sharded weight is cut along its first dimension, and the largest share
counts. What an update makes meanwhile, at most 4 bytes a trained parameter, comes when the activations are gone.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.engine.loss import piece_bytes
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.meta import Units, Weight

# A backward pass keeps, of a token, the outputs of all linear layers, and 8 values a unit of width of each layer, such
# as inputs of norms: of a GPT 17, which are 34 bytes in 16 bits (arXiv:2205.05198). An adapter keeps what it drops out.
KEPT_VALUES, LEAST_VALUES, DROPPED_VALUES = 8, 17, 1.25
LOGIT_VALUES = 4  # a token and piece of the vocabulary: all logits, those with a label, and the gradients of both
FP32 = 4
CPU_HEAP = 2  # glibc's heap over what is live in it, for buffers of a step (benchmarks/memory.py)
EIGHT_BIT_FROM, EIGHT_BIT_BLOCK = 4096, 256  # of bitsandbytes: smaller tensors keep fp32; values that share a scale


Shard = Literal["none", "grads", "full"]


@dataclass(frozen=True)
class ModelSize:
    """The size of a base with what is trained of it. `adapter` has the shapes of the adapter's parameters.

    `is_mapped` where the weights stay in the page cache, as views of their file, which the ranks of a machine share.
    `frozen_layers` are those at the bottom that nothing learns in or below.
    """

    layers: int
    width: int
    vocabulary: int
    units: Units
    adapter: tuple[tuple[int, ...], ...]
    spec: DeviceSpec
    optimizer: str = "adamw"
    is_mapped: bool = False
    frozen_layers: int = 0

    @property
    def learning(self) -> int:
        """Return the number of layers that a gradient passes through."""
        return self.layers - self.frozen_layers

    @property
    def weights(self) -> list[Weight]:
        """Return the weights of the base."""
        return [weight for unit in self.units for weight in unit]

    @property
    def trained(self) -> list[Weight]:
        """Return what is trained: parameters of an adapter, or weights of the base."""
        adapter = [Weight(shape, outputs=0, is_trained=True) for shape in self.adapter]
        return [*(weight for weight in self.weights if weight.is_trained), *adapter]

    @property
    def trainable(self) -> int:
        """Return the number of trained parameters."""
        return sum(weight.numel for weight in self.trained)

    @property
    def parameters(self) -> int:
        """Return the number of parameters of base and adapter."""
        return sum(weight.numel for weight in self.weights) + sum(map(math.prod, self.adapter))


@dataclass(frozen=True)
class Layout:
    """How a run spreads the base: `shard_size` ranks share one copy of it, `per_machine` the memory of one host."""

    world_size: int = 1
    per_machine: int = 1
    shard: Shard = "none"
    shard_size: int = 1
    offloads: bool = False


@dataclass(frozen=True)
class Parts:
    """Memory by part, in bytes. `trained` are parameters in fp32, `gathered` what is whole for as long as it computes:
    weights of sharded layers, copies in 16 bits, gradients on their way.
    """

    weights: int = 0
    trained: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    activations: int = 0
    logits: int = 0

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def __str__(self) -> str:
        found = {part.name: getattr(self, part.name) for part in fields(self)}
        return ", ".join(f"{name} {gigabytes(size)}" for name, size in found.items() if size >= 0.01 * self.total)

    @property
    def total(self) -> int:
        """Return the sum of the parts."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Memory:
    """What one rank takes of its device, and, for shards that are offloaded, of the memory of its host."""

    device: Parts
    host: Parts = Parts()

    def __str__(self) -> str:
        on_host = f"; of the host {gigabytes(self.host.total)} ({self.host})" if self.host.total else ""
        return f"{gigabytes(self.device.total)} ({self.device}){on_host}"


@dataclass(frozen=True)
class Estimate:
    """What a run needs on one rank, and its work, in parameters x tokens."""

    memory: Memory
    disk: int  # bytes of checkpoints at their most, with one being written, and of the final model
    work: float  # over all steps


# ------------------------------------------------------------------------------------------------------------ memory


def memory(size: ModelSize, layout: Layout, tokens: int = 0, recomputes: bool = False, pads: bool = False) -> Memory:
    """Return what a rank takes for batches of so many tokens; `pads` where the logits of all of them are kept."""
    ranks = 1 if layout.shard == "none" else layout.shard_size
    base = _state([_share(weight, ranks) for weight in size.weights], size)
    if size.is_mapped and layout.shard == "none":
        base = base + Parts(weights=-(base.weights - base.weights // layout.per_machine))
    adapter = _state([Weight(shape, outputs=0, is_trained=True) for shape in size.adapter], size)
    computing = Parts(
        gathered=_gathered_bytes(size, layout.shard),
        activations=tokens * activation_bytes(size, recomputes),
        logits=_logit_bytes(size, tokens, pads),
    )
    if layout.offloads and size.spec.device.type == "cuda":
        return Memory(adapter + computing, host=base)
    return Memory(base + adapter + computing)


def _share(weight: Weight, ranks: int) -> Weight:
    """Return what the first of some ranks holds of a weight."""
    first, *others = weight.shape or (1,)
    return weight._replace(shape=(math.ceil(first / ranks), *others), outputs=math.ceil(weight.outputs / ranks))


def _state(weights: Iterable[Weight], size: ModelSize) -> Parts:
    """Return what weights take between two steps: as they are held, with gradients and moments of those that learn."""
    weights = list(weights)
    trained = [weight for weight in weights if weight.is_trained]
    masters = FP32 * sum(weight.numel for weight in trained)
    return Parts(
        weights=sum(weight.frozen_bytes(size.spec) for weight in weights if not weight.is_trained),
        trained=masters,
        gradients=masters,
        optimizer=sum(moment_bytes(weight.shape, size.optimizer) for weight in trained),
    )


def moment_bytes(shape: tuple[int, ...], optimizer: str) -> int:
    """Return the bytes that an optimizer keeps of a parameter of this shape."""
    number, step = math.prod(shape), FP32
    if optimizer == "adafactor" and len(shape) > 1:  # means of rows and of columns
        return FP32 * (number // shape[-1] + number // shape[-2]) + step
    if optimizer == "adafactor":
        return FP32 * number + step
    if optimizer == "adamw_8bit" and number >= EIGHT_BIT_FROM:
        return 2 * (number + FP32 * math.ceil(number / EIGHT_BIT_BLOCK))
    return 2 * FP32 * number + (step if optimizer == "adamw" else 0)


def _gathered_bytes(size: ModelSize, shard: str) -> int:
    """Return what is whole while it computes, over what is held between two steps.

    A layer is gathered while the one before it computes. What is outside the layers stays gathered for a step. The
    gradients of a unit are whole, in the precision that computes, and as the fp32 message that sums them.
    """
    compute = size.spec.dtype.itemsize
    dequantised = compute * max((one.numel for one in size.weights if one.outputs), default=0)
    dequantised *= size.spec.bits != 16
    if shard == "none":  # autocast keeps a copy of every trained matrix for a step
        matrices = sum(weight.numel for weight in size.weights if weight.is_trained and len(weight.shape) > 1)
        return dequantised + (compute * matrices if compute < FP32 else 0)
    whole = [
        sum(compute * one.numel if one.is_trained else one.frozen_bytes(size.spec) for one in unit)
        for unit in size.units
    ]
    outside, layers = whole[0], whole[1:] or [0]
    gradients = (compute + FP32) * max(sum(one.numel for one in unit if one.is_trained) for unit in size.units)
    kept = sum(layers) if shard == "grads" else max(layers)
    return dequantised + outside + kept + max(layers) + gradients


def activation_bytes(size: ModelSize, recomputes: bool = False) -> int:
    """Return the bytes that a backward pass keeps of a token: of all layers, or of one, and the inputs of all."""
    values = sum(weight.outputs for weight in size.weights) + KEPT_VALUES * size.width * size.layers
    values = max(values, LEAST_VALUES * size.width * size.layers)  # experts are no linear layers
    adapted = sum(len(shape) > 1 for shape in size.adapter) // 2
    values = math.ceil(values * size.learning / size.layers)  # below the first layer that learns nothing is kept
    values += math.ceil(DROPPED_VALUES * size.width * adapted)
    if recomputes:
        values = math.ceil(values / max(1, size.learning)) + size.width * size.learning
    return values * size.spec.dtype.itemsize * _heap(size)


def _heap(size: ModelSize) -> int:
    return CPU_HEAP if size.spec.device.type == "cpu" else 1


def _logit_bytes(size: ModelSize, tokens: int, pads: bool) -> int:
    if pads:
        return LOGIT_VALUES * size.spec.dtype.itemsize * size.vocabulary * tokens * _heap(size)
    piece = piece_bytes(size.spec.device, size.vocabulary)
    return 2 * min(piece, FP32 * size.vocabulary * tokens) * _heap(size)  # a piece, and its copy or gradient


def most_tokens(size: ModelSize, free: int) -> int:
    """Return how many tokens have activations that fit into so many bytes."""
    return free // activation_bytes(size)


def save_bytes(size: ModelSize) -> int:
    """Return what the final save takes more, on the rank that writes: the largest weight, in fp32 and as written."""
    return max((FP32 + size.spec.dtype.itemsize) * weight.numel for weight in size.trained)


# ---------------------------------------------------------------------------------------------------- work and disk


def tokens_per_step(lengths: np.ndarray, batch_size: int) -> int:
    """Return the tokens of an average optimizer step, over all ranks."""
    return math.ceil(int(lengths.sum()) / len(lengths) * batch_size)


def work(size: ModelSize, tokens_a_step: int, total_steps: int, world_size: int) -> float:
    """Return the parameters x tokens that one rank computes in a run."""
    return size.parameters * tokens_a_step * total_steps / world_size


def checkpoint_bytes(size: ModelSize) -> int:
    """Return the bytes of the tensors in a checkpoint, over all ranks: what is trained, in fp32, and its moments."""
    return FP32 * size.trainable + sum(moment_bytes(weight.shape, size.optimizer) for weight in size.trained)


def disk_bytes(size: ModelSize, config: FinetuneConfig, total_steps: int, save_steps: int) -> int:
    """Return what a run writes at its most: its checkpoints, the best one, and one staged or the final model."""
    kept = min(config.save_total_limit, total_steps // save_steps)
    final = size.spec.dtype.itemsize * size.parameters if config.tune == "full" else 0
    return checkpoint_bytes(size) * (kept + 1) + max(checkpoint_bytes(size), final)


# ------------------------------------------------------------------------------------------------------ what is free


@dataclass(frozen=True)
class Free:
    """The bytes that a rank may take of its device and of its host; of a CPU and a host, its share."""

    device: int
    host: int

    def holds(self, needed: Memory) -> bool:
        """Return whether there is enough."""
        return needed.device.total <= self.device and needed.host.total <= self.host

    def __str__(self) -> str:
        on_host = f" and {gigabytes(self.host)} of the host" if self.host != self.device else ""
        return gigabytes(self.device) + on_host
