"""Which modules of a model get an adapter: names, full names and regular expressions, as PEFT reads them.

An expression may come from a stranger's adapter_config.json, and some take years. All are first tried in a process
that can be ended.
"""

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from lora_alpaca.errors import ModelError
from lora_alpaca.models.meta import is_linear

FLAG = "--lora_target_modules"
SECONDS, CHARACTERS = 5.0, 2000  # the most that the expressions of an adapter may take
SPECIAL = frozenset(r"\*+?|()[]{}^$")  # a dot is in every full name
TRIAL = """
import json, re, sys
expressions, names = json.load(sys.stdin)
try:
    found = [[name for name in names if re.fullmatch(one, name)] for one in expressions]
except (re.error, RecursionError, OverflowError) as error:
    found = str(error)
json.dump(found, sys.stdout)
"""


def is_expression(text: str) -> bool:
    """Return whether a target is a regular expression, not a name."""
    return not SPECIAL.isdisjoint(text)


def matches(expressions: Sequence[str], names: Iterable[str]) -> list[list[str]]:
    """Return for every regular expression the names that it matches as a whole.

    Raises ValueError, in one line, for what is none, and for one that takes too long.
    """
    if not expressions:
        return []
    if (long := max(expressions, key=len)) and len(long) > CHARACTERS:
        raise ValueError(f"the expression {long[:40]}... has {len(long)} characters, and {CHARACTERS} are allowed")
    try:
        trial = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", TRIAL],
            input=json.dumps([list(expressions), list(names)]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        found = json.loads(trial.stdout)
    except subprocess.TimeoutExpired:
        raise ValueError(f"matching {_listed(expressions)} takes longer than {SECONDS:.0f} seconds") from None
    except ValueError:  # the process died, as a regular expression of the size of the memory lets it
        raise ValueError(f"{_listed(expressions)} cannot be matched") from None
    if isinstance(found, str):
        raise ValueError(f"{_listed(expressions)} is no regular expression: {found}")
    return found


def resolve(model: Any, asked: Sequence[str]) -> list[str] | str:
    """Return target modules as PEFT takes them: a list of names, or one regular expression over full names.

    Raises ModelError for a target that matches no module, or one that cannot carry an adapter.
    """
    modules = {name: part for name, part in model.named_modules() if name}
    expressions = [target for target in asked if is_expression(target)]
    try:
        found = dict(zip(expressions, matches(expressions, modules), strict=True))
    except ValueError as error:
        raise ModelError(f"{FLAG}: {error}") from None
    for target in asked:
        if target not in expressions:
            found[target] = [name for name in modules if name == target or name.endswith(f".{target}")]
    if missing := [target for target in asked if not found[target]]:
        raise ModelError(_missing(model, missing))
    for target in asked:
        _require_linear(model, modules, target, found[target])
    if not expressions:
        return list(asked)
    if len(asked) == 1:
        return asked[0]
    return "|".join(f"(?:{target})" if target in expressions else rf"(?:.*\.)?{re.escape(target)}" for target in asked)


def parameters(model: Any, asked: Sequence[str]) -> list[str]:
    """Return parameters as PEFT takes them, by the ends of their names.

    Raises ModelError for one that is not there, that is the weight of a linear layer, or that is no stack of matrices.
    """
    stacks = sorted(name for name, part in model.named_parameters() if part.dim() == 3)
    missing = [one for one in asked if not any(name == one or name.endswith(f".{one}") for name in stacks)]
    if missing:
        there = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in stacks}))
        raise ModelError(
            f"--lora_target_parameters {','.join(missing)}: the model has no such stack of matrices; "
            + (f"it has {there}" if there else f"it has none, and its layers are for {FLAG}")
        )
    return list(asked)


def linear_names(model: Any) -> list[str]:
    """Return the last name parts of all linear layers but the head: what an adapter can be put on."""
    return sorted({name.rpartition(".")[2] for name in _linear(model)})


def _linear(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, part in model.named_modules() if is_linear(part) and part is not head]


def _missing(model: Any, missing: Sequence[str]) -> str:
    """Return the line of error for targets that match nothing, with the nearest that there is."""
    there = linear_names(model)
    near = [(target, _nearest(target, there, _linear(model))) for target in missing if not is_expression(target)]
    nearest = "".join(f"; nearest to {target}: {name}" for target, name in near if name)
    return f"{FLAG} {','.join(missing)}: the model has no such module; it has {', '.join(there)}{nearest}"


def _nearest(target: str, there: Sequence[str], full: Sequence[str]) -> str:
    """Return the last name part, or for a target with a dot the full name, that is most like a target, or nothing."""
    last = target.rpartition(".")[2]
    same = [name for name in full if name.rpartition(".")[2] == last] or full
    found = difflib.get_close_matches(
        target, same if "." in target else there, n=1, cutoff=0.3 if "." in target else 0.6
    )
    return next(iter(found), "")


def _require_linear(model: Any, modules: dict[str, Any], target: str, matched: Sequence[str]) -> None:
    """Raise ModelError if a target matches the head, or a module that is no linear layer."""
    head = model.get_output_embeddings()
    for name in matched:
        part = modules[name]
        if part is head:
            tied = part.weight is model.get_input_embeddings().weight
            shared = ", and its weights are the embedding's too" if tied else ""
            raise ModelError(
                f"{FLAG} {target}: {name} is the model's head, and left out on purpose: the loss is computed through "
                f"it as it is{shared}; the layers are {', '.join(linear_names(model))}"
            )
        if not is_linear(part):
            raise ModelError(
                f"{FLAG} {target}: {name} is a module of class {type(part).__name__}, and an adapter is put on linear "
                f"layers: {', '.join(linear_names(model))}"
            )


def _listed(expressions: Sequence[str]) -> str:
    return ", ".join(one if len(one) <= 100 else f"{one[:100]}..." for one in expressions)
