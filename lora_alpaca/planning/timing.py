"""The cost model: how long a run computes on a device of the table, from operations and from bytes that are moved.

An optimizer step takes what its products take at the rate that the device sustains, and what everything else takes at
the bandwidth that it sustains, one after the other. It is an estimate: its two shares are assumptions (`devices`).
"""

import math
from dataclasses import dataclass

from lora_alpaca.models.meta import Weight
from lora_alpaca.planning.devices import BANDWIDTH_SHARE, Device
from lora_alpaca.planning.estimate import Layout, ModelSize

PASSES = 4  # over each output of a layer: written, read by the next one, read again in the backward pass, its gradient
POINTWISE = 8  # values a unit of width that a layer makes beside the outputs of its products
LINK = 20e9  # bytes a second between a device and its host, or another device
START = 60.0  # seconds from the command to the first step, beside the load


@dataclass(frozen=True)
class StepWork:
    """What a rank computes in an average step: `tokens` in `batches`, of rows of `length`, with so many predictions."""

    tokens: float
    predictions: float
    batches: float
    length: float


def step_seconds(
    device: Device, size: ModelSize, work: StepWork, recomputes: bool, layout: Layout | None = None
) -> float:
    """Return the time of an optimizer step on one device; weights that are not on it are fetched for every batch."""
    forward, backward = operations(size, work, recomputes)
    products = (forward + backward) / device.rate(size.spec.dtype)
    moving = moved_bytes(size, work, recomputes) / (device.bandwidth * BANDWIDTH_SHARE)
    if layout is None or layout.shard == "none":
        return products + moving
    fetched = sum(weight.frozen_bytes(size.spec) for weight in size.weights) * work.batches * (3 if recomputes else 2)
    return products + moving + fetched / LINK


def validation_seconds(device: Device, size: ModelSize, work: StepWork) -> float:
    """Return the time of a forward pass over rows without a gradient."""
    forward, _ = operations(size, work, recomputes=False)
    moved = moved_bytes(size, work, recomputes=False) / 3
    return forward / device.rate(size.spec.dtype) + moved / (device.bandwidth * BANDWIDTH_SHARE)


def load_seconds(size: ModelSize, bytes_a_second: float = 1e9) -> float:
    """Return about how long the weights of a base take from a disk."""
    return START + 2 * size.parameters / bytes_a_second


def operations(size: ModelSize, work: StepWork, recomputes: bool) -> tuple[float, float]:
    """Return the operations of the forward passes and of the backward passes of a step.

    A product has two operations a parameter and token, and as many for its gradient by the input, which is needed above
    the first layer that learns, and again by the weight where that learns. Attention sees half of a row on average.
    """
    layers, above = size.units[1:], size.units[1 + size.layers - size.learning :]
    attention = 4 * size.width * work.length / 2 * work.tokens
    forward = sum(map(_multiplied, layers)) * 2 * work.tokens + attention * size.layers
    again = sum(map(_multiplied, above)) * 2 * work.tokens + attention * size.learning
    adapter = 2 * sum(map(math.prod, size.adapter)) * work.tokens
    head = 2 * size.vocabulary * size.width * work.predictions
    learning = sum(weight.numel for unit in layers for weight in unit if weight.is_trained and weight.outputs)
    head_learns = any(weight.is_trained for weight in size.units[0])
    backward = again + attention * size.learning + 2 * learning * work.tokens + 2 * adapter + head * (1 + head_learns)
    return forward + adapter + head + (again if recomputes else 0), backward


def _multiplied(unit: tuple[Weight, ...]) -> float:
    """Return the parameters of a unit that a token is multiplied with."""
    return sum(weight.numel for weight in unit if weight.outputs or len(weight.shape) > 1)


def moved_bytes(size: ModelSize, work: StepWork, recomputes: bool) -> float:
    """Return the bytes that a step moves: weights for every batch, outputs of layers, and what the optimizer holds."""
    compute = size.spec.dtype.itemsize
    passes = 3 if recomputes else 2
    weights = sum(weight.frozen_bytes(size.spec) for weight in size.weights)
    if size.spec.bits != 16:  # written in the compute dtype, and read again
        weights += 2 * compute * sum(weight.numel for weight in size.weights if weight.outputs)
    outputs = sum(weight.outputs for weight in size.weights) + POINTWISE * size.width * size.layers
    activations = work.tokens * compute * outputs * PASSES * passes / 2
    return work.batches * passes * weights + activations + 28 * size.trainable  # fp32: gradient, moments, weight
