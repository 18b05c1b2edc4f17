"""How many threads a run computes with on a CPU: its own number, for sums are rounded by how they are shared out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
        notes.append(f"computing with {number} threads ({why}), not {own}")
    torch.set_num_threads(number)
    try:
        yield notes
    finally:
        torch.set_num_threads(own)
