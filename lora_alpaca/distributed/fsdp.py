"""A model whose weights are spread over the ranks by FSDP2, a layer at a time, and gathered when it computes.

The weights of the base are sharded, whether they learn or not, and each rank reads its own part of them from the
files. An adapter stays whole on every rank, so that its gradients are summed, and it is saved, as without sharding.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lora_alpaca.distributed.strategy import Prepare, Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.layers import decoder_layers, library_model
from lora_alpaca.models.skeleton import Skeleton


class _Root(torch.nn.Module):
    """The model as FSDP2 sees it: whatever computes with its weights is called through `forward`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        return compute(batch)


class Sharded(Replicated):
    """The base is sharded over the ranks. `keeps_gathered`: from a layer's forward to its backward, as in ZeRO-2.

    With `shard_size`, so many ranks share the weights, and the others hold copies; it divides the number of ranks. A
    rank that is alone has all shards.
    """

    in_lockstep = True

    def __init__(self, world: World, keeps_gathered: bool, shard_size: int | None, offloads: bool, trains_base: bool):
        super().__init__(world)
        self.spreads_state = trains_base
        self._keeps_gathered, self._offloads = keeps_gathered, offloads
        if not torch.distributed.is_initialized():
            store = torch._C._distributed_c10d.HashStore()
            torch.distributed.init_process_group(store=store, rank=0, world_size=1)
        size = shard_size or world.world_size
        copies = world.world_size // size
        shape, names = ((size,), ("shard",)) if copies == 1 else ((copies, size), ("replicate", "shard"))
        self._mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        self._root: Any = None

    def load(self, base: Base, spec: DeviceSpec, prepare: Prepare) -> tuple[Any, list[str]]:
        """Return the model, its base sharded, and notes. No rank ever holds more of it than its part and a layer."""
        flag = f"--shard {'grads' if self._keeps_gathered else 'full'}"
        skeleton = Skeleton(base, spec, flag, on_meta=self.spreads_state)
        model = prepare(skeleton.model)
        self._shard(model, skeleton)
        skeleton.fill(self._own)
        with torch.no_grad():
            self.call(lambda _: torch.zeros(()), None)  # FSDP looks for its parts while all layers are in the model
        return model, skeleton.notes

    def _shard(self, model: Any, skeleton: Skeleton) -> None:
        """Shard layer by layer; embedding and head apart, or with what is left where they are tied."""
        root = _Root(model)
        whole = {one for one in model.parameters() if one.dim() == 0 or (one.requires_grad and not self.spreads_state)}
        policy = OffloadPolicy()
        if self._offloads:
            policy = CPUOffloadPolicy(pin_memory=self._mesh.device_type != "cpu")
        precision = MixedPrecisionPolicy()
        if self.spreads_state and self._world.spec.dtype != torch.float32:
            precision = MixedPrecisionPolicy(self._world.spec.dtype, torch.float32, cast_forward_inputs=False)
        base = library_model(model)
        _, layers = decoder_layers(base)
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        tied = head is None or head.weight is embedding.weight
        for part in [*layers, *([] if tied else [embedding, head]), root]:
            skeleton.give_memory(part)
            fully_shard(
                part,
                mesh=self._mesh,
                ignored_params=whole,
                offload_policy=policy,
                mp_policy=precision,
                reshard_after_forward=None if part is root else not self._keeps_gathered,
            )
        self._root = root
        for part in _sharded_parts(root):
            part.set_gradient_divide_factor(1.0)  # the loss is divided beforehand, by the labels of all ranks
            part.set_force_sum_reduction_for_comms(self._mesh.device_type == "cpu")  # gloo knows no average

    def _own(self, parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return this rank's part of a parameter, and the number of its first row."""
        if not isinstance(parameter, DTensor):
            return parameter.data, 0
        mesh = self._mesh["shard"]
        return parameter.to_local(), mesh.get_local_rank() * math.ceil(len(parameter) / mesh.size())

    def call(self, compute: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        """Return what a forward pass of the model returns, its weights gathered layer by layer."""
        result: torch.Tensor = self._root(compute, batch)
        if not torch.is_grad_enabled():  # no backward follows, which would let go of what is gathered
            self.forget_gathered()
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

    def forget_gathered(self) -> None:
        """Let go of weights that a pass has left gathered: their shards were changed in place."""
        for part in _sharded_parts(self._root):
            part.reshard()

    def largest(self, number: float) -> float:
        """Return the largest of the numbers of all ranks; NaN if one of them is."""
        return self._world.largest(number)

    def reduce(self, parameters: Sequence[torch.nn.Parameter], scalars: Sequence[torch.Tensor]) -> list[float]:
        """Sum gradients and scalars over the ranks; those of sharded parameters are summed by their backward pass."""
        for parameter in parameters:
            if parameter.grad is None:  # no rank had one
                parameter.grad = torch.zeros_like(parameter)
        return super().reduce([one for one in parameters if not isinstance(one, DTensor)], scalars)

    def clip(self, parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
        """Scale the gradients down to a norm over all shards, and return the norm before."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        of_shards = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
        of_whole = [grad for grad in grads if not isinstance(grad, DTensor)]
        if not of_shards:
            return super().clip(parameters, max_norm)
        squares = torch.stack([grad.norm().square() for grad in of_shards]).sum()
        copies = self._mesh.size() // self._mesh["shard"].size()
        squares = self._world.sum(squares.cpu()) / copies
        norm = math.sqrt(squares.item() + sum(grad.norm().square().item() for grad in of_whole))
        if norm > max_norm:
            for grad in of_shards + of_whole:
                grad.mul_(max_norm / (norm + 1e-6))
        return norm


def _sharded_parts(root: Any) -> list[Any]:
    """Return the modules that are sharded, the innermost first."""
    return [part for part in root.modules() if isinstance(part, FSDPModule)][::-1]
