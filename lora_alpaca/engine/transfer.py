"""Batches on their way to a card: made in a thread while it computes, in pages that are copied without waiting."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from queue import Full, Queue
from typing import Any, TypeVar

import torch

from lora_alpaca.engine.batches import Batch

Item = TypeVar("Item")
AnyBatch = TypeVar("AnyBatch", bound=Batch)
OF_THE_HOST = ("row_index", "prediction_index")  # a loss by row asks for them, which a step does not
POLL = 0.05  # seconds after which the thread looks whether anybody still waits for it


def pinned(batch: AnyBatch) -> AnyBatch:
    """Return a batch in pages of the host that a card reads by itself."""
    return _each(batch, lambda tensor: tensor.pin_memory())


def moved(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """Return a batch on a device; the copies are in the order of what the device computes, which nobody waits for."""
    return _each(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _each(batch: AnyBatch, change: Any) -> AnyBatch:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in OF_THE_HOST}
    return replace(batch, **{name: change(one) for name, one in tensors.items() if isinstance(one, torch.Tensor)})


@contextmanager
def one_ahead(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """Give an iterator over items that are made in a thread, one before it is asked for; an error comes in its place.

    Only making them is done there: it draws nothing at random, and no signal is handled there. When the context ends,
    however far the items were taken, the thread has ended.
    """
    made: Queue[tuple[Any, BaseException | None, bool]] = Queue(maxsize=1)
    unwanted = threading.Event()

    def put(item: Any, error: BaseException | None, is_last: bool) -> None:
        while not unwanted.is_set():
            try:
                return made.put((item, error, is_last), timeout=POLL)
            except Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item, None, False)
                if unwanted.is_set():
                    return
            put(None, None, True)
        except BaseException as error:  # raised where the item is asked for
            put(None, error, True)

    def taken() -> Iterator[Item]:
        while True:
            item, error, is_last = made.get()
            if error is not None:
                raise error
            if is_last:
                return
            yield item

    thread = threading.Thread(target=make, daemon=True, name="batches")
    thread.start()
    try:
        yield taken()
    finally:
        unwanted.set()
        thread.join()
