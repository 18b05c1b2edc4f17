"""The search of the learning rate, as a report shows it: what was tried, the curve, and what was chosen."""

from collections.abc import Mapping
from typing import Any

from lora_alpaca.planning.budget import minutes
from lora_alpaca.training.report import plots
from lora_alpaca.training.report.document import Block, Heading, Paragraph, Plot, Table

TITLE = "Loss by learning rate"


def blocks(record: Mapping[str, Any]) -> list[Block]:
    """Return what the report says of the search that a run's record holds; nothing where there was none."""
    found = record.get("rate_search")
    if not found:
        return []
    horizons = sorted({trial["steps"] for trial in found["trials"]})
    losses = {(trial["rate"], trial["steps"]): trial["loss"] for trial in found["trials"]}
    rows = [
        [f"{rate:.1e}", *(_loss(losses, rate, steps) for steps in horizons)]
        for rate in sorted({trial["rate"] for trial in found["trials"]})
    ]
    drawn = curve(record)
    return [
        Heading("Search of the learning rate"),
        Paragraph(
            f"{found['rate']:g} was chosen, in {minutes(found['seconds'])}: {found['best']:.1e} was best after "
            f"{found.get('steps', max(horizons))} steps of {found['batch_size']} rows, and is scaled to the length and "
            f"the batch of the run. {found['judges']} held-out rows judged."
        ),
        *([drawn] if drawn else []),
        Table(["rate", *(f"after {steps} steps" for steps in horizons)], rows),
    ]


def curve(record: Mapping[str, Any]) -> Plot | None:
    """Return the losses over the rates, a curve for each horizon; None without a search or a library that draws."""
    trials = (record.get("rate_search") or {}).get("trials", [])
    points: dict[str, list[tuple[float, float]]] = {}
    for trial in sorted(trials, key=lambda trial: (-trial["steps"], trial["rate"])):
        if trial["loss"] is not None:
            points.setdefault(f"{trial['steps']} steps", []).append((trial["rate"], trial["loss"]))
    if not points or not plots.available():
        return None
    return plots.curve(TITLE, points, "nats per token", log=True, over="learning rate")


def _loss(losses: Mapping[tuple[float, int], float | None], rate: float, steps: int) -> str:
    if (rate, steps) not in losses:
        return ""
    loss = losses[rate, steps]
    return "diverges" if loss is None else f"{loss:.4f}"
