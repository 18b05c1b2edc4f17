"""Imports bitsandbytes without torch's compiler, which it loads to wrap four functions of backends that few have.

PEFT imports bitsandbytes where it is installed, so this module is imported before PEFT is. The functions are wrapped
when one of them is first called, and the compiler, a second of every start, is loaded then.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

import torch


def import_bitsandbytes() -> None:
    """Import bitsandbytes, if it can be; where it is needed and cannot, that is told there."""
    if "bitsandbytes" in sys.modules:
        return
    at_once = torch.compile
    torch.compile = _deferred(at_once)
    try:
        with suppress(Exception):
            import bitsandbytes  # noqa: F401
    finally:
        torch.compile = at_once


def _deferred(compile: Callable[..., Any]) -> Callable[..., Any]:
    """Return what wraps a function as `compile` does, and calls that when the function is first called."""

    def wrap(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled: list[Callable[..., Any]] = []

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(compile(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    return wrap


import_bitsandbytes()
