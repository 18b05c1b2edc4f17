"""How the gradients of ranks that hold the whole model become one; sharded ones are in test_fsdp.py."""

from types import SimpleNamespace

import torch

from lora_alpaca.distributed.strategy import Replicated


class TwoRanks(SimpleNamespace):
    """A world in which the other rank has the same numbers."""

    world_size = 2

    def sum(self, tensor):
        self.messages = [*getattr(self, "messages", []), tensor.clone()]
        return tensor * 2


def test_gradients_and_scalars_are_summed_in_one_message():
    first, second = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
    first.grad = torch.arange(6.0).view(2, 3)
    world = TwoRanks()
    scalars = Replicated(world).reduce([first, second], [torch.tensor(1.5), torch.tensor(7.0)])
    assert scalars == [3.0, 14.0]
    assert torch.equal(first.grad, 2 * torch.arange(6.0).view(2, 3))
    assert torch.equal(second.grad, torch.zeros(4))  # a gradient that is missing counts as zero
    assert len(world.messages) == 1


def test_many_gradients_are_several_messages(monkeypatch):
    monkeypatch.setattr("lora_alpaca.distributed.strategy.MESSAGE", 5)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 4, 7, 1)]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    world = TwoRanks()
    assert Replicated(world).reduce(parameters, [torch.tensor(1.5)]) == [3.0]
    assert [len(message) for message in world.messages] == [5, 4, 7, 2]  # the last one has the scalar too
    assert all(bool((parameter.grad == 2 * (number + 1)).all()) for number, parameter in enumerate(parameters))


def test_one_rank_sends_nothing():
    world = SimpleNamespace(world_size=1)
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert Replicated(world).reduce([parameter], [torch.tensor(2.5)]) == [2.5]
