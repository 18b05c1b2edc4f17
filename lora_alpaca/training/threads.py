"""How many threads a run computes with on a CPU: its own number, for sums are rounded by how they are shared out.

Beside another program one thread may be faster than all: those of a product wait for the one that is held up. A run
that begins measures it, for a second, and keeps what is faster. Its record has the number, for runs that go on with it.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import Engine

TOLD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # variables by which a user has said it
# How many times as fast one thread has to be. Beside a busy loop it is 1.5 and more, in a process of its own on a quiet
# machine 1.3 at most; a choice by chance would make two adapters of one command.
CLEARLY = 1.35
SECONDS = 0.1  # that a measured pass should take
ALL_SECONDS, LEAST = 1.0, 3  # of the measurement, and rounds of it
LONG = 1.0  # seconds of a pass over one row from which on threads seldom wait, and a measurement takes long


@contextmanager
def used(asked: int | None, before: int | None) -> Iterator[list[str]]:
    """Compute with the threads that are asked for, else with those of the run before, else with torch's own.

    Torch has one for every core that this process may use, or OMP_NUM_THREADS. Yield a note where it gets others.
    """
    own = torch.get_num_threads()
    number = asked or before or own
    notes = []
    if asked and before and asked != before:
        notes.append(f"--threads {asked}: the run began with {before}, and goes on with other roundings")
    elif number != own:
        why = "--threads" if asked else "as when the run began"
        notes.append(f"computing with {number} thread{'s' * (number > 1)} ({why}), not {own}")
    torch.set_num_threads(number)
    try:
        yield notes
    finally:
        torch.set_num_threads(own)


def choose(engine: Engine, examples: Sequence[Example], world: World, told: int | None) -> list[str]:
    """Compute with one thread from here on, where gradients of a few of the examples are clearly faster with it.

    Return a note then. Nothing learns from it, and random numbers are as before. Nothing is measured where the number
    is `told`, by the user or the run that is gone on with, for a GPU, or for several ranks, which share the cores.
    """
    most = torch.get_num_threads()
    if told or any(os.environ.get(name) for name in TOLD):
        return []
    if world.device.type != "cpu" or world.world_size > 1 or most == 1:
        return []

    def gradients(rows: Sequence[Example]) -> None:
        with world.autocast():
            loss = engine.loss(next(engine.batches(rows)))
        loss.backward()
        engine.model.zero_grad(set_to_none=True)

    row = [min(examples, key=lambda example: len(example.ids))]
    engine.model.train()
    with torch.random.fork_rng(devices=[]):
        gradients(row)  # whatever a first pass makes is there then
        taken = seconds_of(lambda: gradients(row))
        if taken > LONG:
            return []
        rows = examples[: max(1, int(SECONDS / taken))]
        number, ratio = faster(lambda: gradients(rows), most)
    torch.set_num_threads(number)
    if number == most:
        return []
    return [f"computing with 1 thread, measured {ratio:.1f} times as fast as {most} (--threads)"]


def faster(step: Callable[[], object], most: int) -> tuple[int, float]:
    """Return 1 where `step` is clearly faster with one thread than with `most`, else `most`; and how many times as fast
    one thread is, by the median of some rounds.
    """
    ratios: list[float] = []
    before = torch.get_num_threads()
    step()
    begun = time.perf_counter()
    while len(ratios) < LEAST or time.perf_counter() - begun < ALL_SECONDS:
        seconds = []
        for number in (most, 1):
            torch.set_num_threads(number)
            seconds.append(seconds_of(step))
        ratios.append(seconds[0] / seconds[1])
    torch.set_num_threads(before)
    ratio = median(ratios)
    return 1 if ratio > CLEARLY else most, ratio


def seconds_of(step: Callable[[], object]) -> float:
    """Return the time that `step` takes."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun
