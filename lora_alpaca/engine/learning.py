"""Finds the modules of an adapter that cannot learn: those that get no gradient on the user's own rows."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.engine.engines import Engine
from lora_alpaca.engine.equivalence import Precision, entries, loss_and_gradient
from lora_alpaca.errors import ModelError

MORE_ROWS = 64  # that are looked at where a few leave a module without a gradient
NAMED = 3  # modules in a message


def require_learning(
    engine: Engine, examples: Sequence[Example], gradient: torch.Tensor, precision: Precision
) -> list[str]:
    """Return notes on experts that few rows reach; `gradient` is that of the adapter by some of the rows.

    Raises ModelError for modules that cannot learn. An expert among others is not one of them: the rows that are
    looked at may all be routed past it, and later ones need not be.
    """
    learning = _learning(engine.model, gradient)
    if engine.access.largest(float(not all(learning.values()))):
        _, gradient = loss_and_gradient(engine, examples[:MORE_ROWS], precision)
        more = _learning(engine.model, gradient)
        learning = {name: found or more[name] for name, found in learning.items()}
    reached = {_with_any_expert(name) for name, found in learning.items() if found}
    silent = [name for name, found in learning.items() if not found]
    experts = [name for name in silent if _with_any_expert(name) in reached]
    if dead := [name for name in silent if name not in experts]:
        raise ModelError(
            f"{len(dead)} of {len(learning)} modules with an adapter get no gradient from any row, so they would learn "
            f"nothing ({_some(dead)}); {_way_on(dead, [name for name in learning if name not in dead])}"
        )
    if not experts:
        return []
    return [
        f"{len(experts)} of {len(learning)} modules with an adapter get no gradient from the first {MORE_ROWS} rows, "
        f"which are routed to other experts ({_some(experts)})"
    ]


def _learning(model: Any, gradient: torch.Tensor) -> dict[str, bool]:
    """Return for every module that is trained, by its name in the base, whether any part of its gradient is not zero.

    B is zero at the beginning, and so is then the gradient of A; that of B is not.
    """
    parameters = [(name, part) for name, part in model.get_base_model().named_parameters() if part.requires_grad]
    found: dict[str, bool] = defaultdict(bool)
    for (name, _), part in zip(parameters, gradient.split([len(entries(one)) for _, one in parameters]), strict=True):
        found[re.split(r"\.(?:lora_|modules_to_save)", name)[0]] |= bool(part.any())
    return found


def _with_any_expert(name: str) -> str:
    """Return a name without its numbers but the first, which is that of the layer."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join("*" if part.isdigit() and place > first else part for place, part in enumerate(parts))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)


def _way_on(dead: Iterable[str], alive: Sequence[str]) -> str:
    """Return what to say instead: an expression for the modules that learn, if a prefix tells them from the others."""
    paths = [name.split(".")[:-1] for name in alive]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    prefix = ".".join(parts[0] for parts in same)
    names = "|".join(sorted({name.rpartition(".")[2] for name in alive}))
    expression = rf"{re.escape(prefix)}\..*({names})"
    if prefix and not any(re.fullmatch(expression, name) for name in dead):
        return f"name those that learn: --lora_target_modules '{expression}'"
    return "name those that learn with --lora_target_modules"
