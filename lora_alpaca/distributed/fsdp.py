"""A model whose weights are spread over the ranks by FSDP2, a layer at a time, and gathered when it computes.

The weights of the base are sharded, whether they learn or not. An adapter stays whole on every rank, so that its
gradients are summed, and it is saved, as without sharding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lora_alpaca.distributed.strategy import Prepare, Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.layers import decoder_layers


class _Root(torch.nn.Module):
    """The model as FSDP2 sees it: whatever computes with its weights is called through `forward`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        return compute(batch)


class Sharded(Replicated):
    """The base is sharded over the ranks. `keeps_gathered`: from a layer's forward to its backward, as in ZeRO-2."""

    in_lockstep = True

    def __init__(self, world: World, keeps_gathered: bool, shard_size: int | None, offloads: bool, trains_base: bool):
        super().__init__(world)
        self.spreads_state = trains_base
        self._keeps_gathered, self._offloads = keeps_gathered, offloads
        size = shard_size or world.world_size
        copies = world.world_size // size
        shape, names = ((size,), ("shard",)) if copies == 1 else ((copies, size), ("replicate", "shard"))
        self._mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        self._root: Any = None

    def load(self, base: Base, spec: DeviceSpec, prepare: Prepare) -> tuple[Any, list[str]]:
        """Return the model, its base sharded, and notes."""
        model, notes = super().load(base, spec, prepare)
        self._shard(model)
        return model, notes

    def _shard(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        whole = {parameter for name, parameter in model.named_parameters() if ".lora_" in name}
        policy = CPUOffloadPolicy() if self._offloads else OffloadPolicy()
        options: dict[str, Any] = {"mesh": self._mesh, "ignored_params": whole, "offload_policy": policy}
        _, layers = decoder_layers(base)
        for layer in layers:
            fully_shard(layer, reshard_after_forward=not self._keeps_gathered, **options)
        self._root = fully_shard(_Root(model), **options)
        for part in self._root.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # the loss is divided beforehand, by the labels of all ranks
                part.set_force_sum_reduction_for_comms(self._mesh.device_type == "cpu")  # gloo knows no average

    def call(self, compute: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        """Return what a forward pass of the model returns, its weights gathered layer by layer."""
        result: torch.Tensor = self._root(compute, batch)
        return result

    @contextmanager
    def gathered(self, module: torch.nn.Module) -> Iterator[None]:
        """Gather the weights that are sharded together with those of a module, until the context ends."""
        holder = next(part for part in _sharded_parts(self._root) if module in set(part.modules()))
        holder.unshard()
        try:
            yield
        finally:
            holder.reshard()

    def largest(self, number: float) -> float:
        """Return the largest of the numbers of all ranks; NaN if one of them is."""
        return self._world.largest(number)

    def reduce(self, parameters: Sequence[torch.nn.Parameter], scalars: Sequence[torch.Tensor]) -> list[float]:
        """Sum gradients and scalars over the ranks; those of sharded parameters are summed by their backward pass."""
        return super().reduce([one for one in parameters if not isinstance(one, DTensor)], scalars)

    def clip(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
        """Scale the gradients down to a norm over all shards, and return the norm before."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        of_shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
        of_whole = [grad for grad in grads if not isinstance(grad, DTensor)]
        squares = torch.stack([grad.norm().square() for grad in of_shards] or [torch.zeros(())]).sum()
        copies = self._mesh.size() // self._mesh["shard"].size()
        squares = self._world.sum(squares) / copies
        norm = math.sqrt(squares.item() + sum(grad.norm().square().item() for grad in of_whole))
        if norm > max_norm:
            for grad in of_shards + of_whole:
                grad.mul_(max_norm / (norm + 1e-6))
        return norm


def _sharded_parts(root: Any) -> list[Any]:
    """Return the modules that are sharded, the innermost first."""
    return [part for part in root.modules() if isinstance(part, FSDPModule)][::-1]
