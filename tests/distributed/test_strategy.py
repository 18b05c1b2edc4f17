"""How the gradients of ranks that hold the whole model become one; sharded ones are in test_fsdp.py."""

from types import SimpleNamespace

import pytest
import torch

from lora_alpaca.distributed import world as worlds
from lora_alpaca.distributed.strategy import Replicated


class TwoRanks(SimpleNamespace):
    """A world in which the other rank has the same numbers."""

    world_size, device = 2, torch.device("cpu")

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


def test_on_cards_all_ranks_meet_over_the_host_before_gradients_are_summed():
    """A sum of NCCL's returns at once, and is never done where a rank is missing."""
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.arange(6.0).view(2, 3)
    world = TwoRanks(device=torch.device("cuda"))
    assert Replicated(world).reduce([parameter], [torch.tensor(1.5), torch.tensor(7.0)]) == [3.0, 14.0]
    assert [message.tolist() for message in world.messages] == [[1.5, 7.0], list(range(6))]
    assert torch.equal(parameter.grad, 2 * torch.arange(6.0).view(2, 3))


class NeverDone:
    """A call of NCCL's whose kernel waits for a rank that is gone."""

    def is_completed(self):
        return False


class Soon:
    """A call of NCCL's that is done when it was looked at some times."""

    def __init__(self, looks):
        self.looks, self.waited = looks, False

    def is_completed(self):
        self.looks -= 1
        return self.looks <= 0

    def wait(self):
        self.waited = True


@pytest.mark.parametrize("dead", [(1, "killed"), None])
def test_a_rank_that_dies_while_cards_sum_is_named(dead, monkeypatch):
    monkeypatch.setattr(worlds, "TIMEOUT", 0.0)
    asked = []
    world = worlds.World.__new__(worlds.World)
    world._heartbeat = SimpleNamespace(dead_rank=lambda: asked.append(0) or dead)
    work = Soon(3)
    if dead:
        with pytest.raises(RuntimeError, match="a rank is gone"):
            world._finish(NeverDone())
    else:
        world._finish(work)
        assert work.waited
        assert len(asked) == 2


def test_objects_go_over_the_host_though_sums_are_on_cards(monkeypatch):
    """Of a group with both backends, torch takes the host's for objects and barriers."""
    from torch.distributed import distributed_c10d

    group = SimpleNamespace(_device_types=[torch.device("cpu"), torch.device("cuda")])
    monkeypatch.setattr(distributed_c10d, "ProcessGroup", SimpleNamespace)
    assert distributed_c10d._get_object_coll_device(group) == "cpu"
    assert worlds.BACKEND == "cpu:gloo,cuda:nccl"
    assert distributed_c10d.BackendConfig(worlds.BACKEND).device_backend_map == {"cpu": "gloo", "cuda": "nccl"}


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


def test_what_one_rank_found_is_known_to_all():
    world = SimpleNamespace(world_size=2, gather=lambda text: [text, "out of memory"])
    assert Replicated(world).agreed("") == "out of memory"
    assert Replicated(world).agreed("it differs") == "it differs"
    world.gather = lambda text: [text, ""]
    assert Replicated(world).agreed("") == ""
