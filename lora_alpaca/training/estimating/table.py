"""A forecast in words, for a terminal."""

from dataclasses import asdict

from lora_alpaca.models.memory import gigabytes
from lora_alpaca.planning.budget import minutes
from lora_alpaca.planning.forecast import Forecast

PARTS = {
    "weights": "weights of the base",
    "trained": "adapter, or weights that learn",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "gathered": "whole while it computes",
    "activations": "activations",
    "logits": "logits",
}


def lines(found: Forecast) -> list[str]:
    """Return the lines of a forecast."""
    several = f"{found.devices} x " if found.devices > 1 else ""
    said = [
        *found.notes,
        f"{found.base} on {several}{found.device}: {found.precision}",
        f"rows: {found.rows}",
        f"plan: {found.plan}",
        "",
        f"memory of a device ({found.memory_basis}):",
        *(_amount(PARTS[name], size) for name, size in asdict(found.parts).items() if size),
        *([_amount("workspace", found.workspace)] if found.workspace else []),
        _amount("libraries", found.overhead),
        _amount("peak", found.peak),
        *([_amount("and of the host", found.memory.host.total)] if found.memory.host.total else []),
        f"{'it fits' if found.fits else 'it does not fit'}: {gigabytes(found.free.device)} {found.free_is}",
    ]
    if not found.fits:
        said += [
            f"  with {one.options}: {gigabytes(one.memory)}, {one.times:.1f} times as long" for one in found.remedies
        ]
        said += [] if found.remedies else ["  no option makes it fit: take a smaller model"]
    said += ["", f"steps: {found.steps:,}, of {found.tokens:,} tokens together"]
    if found.seconds:
        share = ", ".join(f"{name} {minutes(seconds)}" for name, seconds in found.seconds.items())
        said.append(f"time: {minutes(found.total_seconds)} ({share})")
    said.append(f"  {found.time_basis}")
    if found.money is not None and found.seconds:
        said.append(f"money: {found.money:,.2f} at {found.price_per_hour:g} an hour")
    return [*said, f"disk: {gigabytes(found.disk)}"]


def _amount(name: str, size: int) -> str:
    return f"  {name:32}{gigabytes(size):>10}"
