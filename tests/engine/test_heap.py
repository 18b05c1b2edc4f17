"""What a CPU's heap keeps: few compiled products, and of large buffers those of steps alone."""

import os
import subprocess
import sys

import pytest

from lora_alpaca.engine import allocator
from lora_alpaca.training.estimating.peak import STATUS

PROGRAMME = """
import sys, torch
from lora_alpaca.engine import allocator
from lora_alpaca.training.estimating.peak import held
if sys.argv[1] == "bounded":
    allocator.bound_kernel_caches()
cpu = torch.device("cpu")
weight = torch.randn(512, 512).bfloat16()
torch.randn(7, 512).bfloat16() @ weight
before = held(cpu)
for tokens in range(100, 500):
    torch.randn(tokens, 512).bfloat16() @ weight
print(held(cpu) - before)
"""


def test_what_the_user_says_of_kernels_stays(monkeypatch):
    name, other = allocator.KERNEL_CACHES
    monkeypatch.setenv(name, "7")
    monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    allocator.bound_kernel_caches()
    assert (os.environ[name], os.environ[other]) == ("7", str(allocator.KERNELS))


@pytest.mark.skipif(not STATUS.exists(), reason="anonymous memory is told by Linux")
def test_products_of_many_shapes_take_no_more_and_more_memory():
    """Where the processor has products in 16 bits, 400 shapes are kept without a bound; with it, 64 of them."""

    unbounded = {name: value for name, value in os.environ.items() if name not in allocator.KERNEL_CACHES}

    def grown(how):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAMME, how], env=unbounded, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert grown("bounded") <= max(0.7 * grown("free"), 30e6)


def test_what_is_freed_is_kept_again_after_answers(monkeypatch):
    calls = []
    monkeypatch.setattr(allocator, "_set", lambda *settings: bool(calls.append(settings[0])))
    monkeypatch.setattr(allocator, "trim", lambda: calls.append("trim"))
    with allocator.returning_large_buffers():
        assert calls == [(allocator.MMAP_MAX, allocator.MAPS), "trim"]  # what steps have left free is given back
    assert calls[2:] == ["trim", (allocator.MMAP_MAX, 0)]
