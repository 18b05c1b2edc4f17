"""Time and memory of a run, measured on this machine in some seconds: on a few layers, drawn on to all of them.

A process trains the model's own architecture, of its widths and vocabulary, with few layers and random weights, on
packs as the plan has them, at two depths. Time grows with the layers as the two differ. Memory grows with them by what
is known to the byte: weights, what learns, and what autograd keeps of a layer.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Builder, Example
from lora_alpaca.models import random_base
from lora_alpaca.models.base import Base
from lora_alpaca.planning.estimate import Parts
from lora_alpaca.planning.plan import Plan

FEW, MORE = 2, 4  # layers; the start check compares the first two
WALL = "perf_counter"
WHOLE = 6  # layers up to which the model is measured as it is
CHECKS = 2  # steps over the rows that are compared at the start: alone, and packed
# of a heap that is kept, what lies in gaps for every byte that a step needs and lets go: 0.4 to 0.7 in runs of Llama
# models of 135M and 300M in bf16, and more in one of two ranks
GAPS, GAPS_OF_RANKS = 0.6, 0.9
NOT_PROBED = {"init_adapter", "resume", "resume_from_checkpoint", "allow_change", "overwrite", "processes"}


class ProbeError(Exception):
    """The process of a probe failed; the text is the line that it ended with."""


@dataclass(frozen=True)
class Probe:
    """What a run takes on this machine: `peak` in bytes, and `start` of it before a model is loaded; seconds by phase.

    A step was one of so many tokens; a batch keeps `saved` bytes for its backward pass.
    """

    peak: int
    start: int
    saved: int
    seconds: Mapping[str, float]
    tokens: int
    basis: str

    @property
    def compiling(self) -> float:
        """Return what the first step takes more than the next."""
        return max(0.0, self.seconds["first step"] - self.seconds["step"])

    def step_seconds(self, tokens: float) -> float:
        """Return the time of an optimizer step of so many tokens: of its batches, and of the update."""
        update = self.seconds["update"]
        return max(0.0, self.seconds["step"] - update) * tokens / self.tokens + update

    def forward_seconds(self, tokens: float) -> float:
        """Return the time of a forward pass over so many tokens."""
        return self.seconds["validation"] * tokens / self.tokens


def take(
    config: FinetuneConfig,
    base: Base,
    plan: Plan,
    parts: Parts,
    rows: Sequence[Example],
    devices: int = 1,
    clock: str = WALL,
) -> Probe:
    """Return what a run takes, of whose layers the `parts` that last are known. Raises ProbeError where it cannot be
    measured.

    On a CPU that several processes share, as many probes run beside each other. `clock` is one of `time`'s.
    """
    layers = base.config.get_text_config().num_hidden_layers
    counts = [layers] if layers <= WHOLE else [MORE, FEW]
    if config.layers != "all" and layers > WHOLE:
        counts = [layers]  # what learns is at the top, and a few layers have no other part
    with tempfile.TemporaryDirectory(prefix="lora-alpaca-probe-") as name:
        _prepare(Path(name), config, base, plan, rows, counts, clock)
        found = _measure(Path(name), devices if config.device == "cpu" else 1)
    whole = "all" if len(counts) == 1 else f"{FEW} and {MORE} of"
    gaps = GAPS if devices == 1 else GAPS_OF_RANKS
    return drawn_on(found, layers, counts, parts, gaps, f"measured here on {whole} {layers} layers")


def drawn_on(
    found: Mapping[str, Any], layers: int, counts: Sequence[int], parts: Parts, share: float, basis: str
) -> Probe:
    """Return what a model of so many layers takes, from figures of fewer; `share` is that of gaps in a heap."""
    more, few, beyond = found["depths"][0], found["depths"][-1], layers - counts[0]

    def of_layer(name: str) -> float:
        """Return the seconds that a layer adds to a phase."""
        by = counts[0] - counts[-1]
        return max(0.0, more["seconds"][name] - few["seconds"][name]) / by if by else 0.0

    seconds = {name: taken + beyond * of_layer(name) for name, taken in more["seconds"].items()}
    a_token = max(0.0, of_layer("step") - of_layer("update")) / found["tokens"]
    seconds["check"] = more["seconds"]["check"] + beyond * CHECKS * found["checked"] * a_token

    saved = more["saved"] + beyond * (more["saved"] - few["saved"]) / max(1, counts[0] - counts[-1])
    peaks, live, beyond_few = found["peaks"], found["live"], beyond / layers  # the share of layers that were left out
    weights = beyond_few * parts.weights
    learning = beyond_few * (parts.trained + parts.gradients + parts.optimizer)
    step = max(live["first step"], live["step"]) + weights + learning + saved - more["saved"]
    lasting = live["update"] + weights + learning  # what is there between two steps
    outside = peaks["load"] - live["load"]  # of libraries, and not in the heap
    gaps = share * (step - lasting) if peaks != live else 0
    update = beyond_few * parts.trained  # what an update makes meanwhile
    peak = max(peaks["start"], peaks["check"] + weights, outside + step + gaps + update)
    return Probe(int(peak), int(peaks["start"]), int(saved), seconds, found["tokens"], basis)


def _prepare(
    folder: Path,
    config: FinetuneConfig,
    base: Base,
    plan: Plan,
    rows: Sequence[Example],
    counts: Sequence[int],
    clock: str,
) -> None:
    """Write what a process needs to train models of so many layers."""
    for layers in counts:
        random_base.write(base, folder / str(layers), layers)
    options = {name: getattr(config, name) for name in config.model_fields_set - NOT_PROBED}
    changed = {"base_model": str(folder / str(counts[0])), "output_dir": str(folder / "out"), "shard": "none"}
    job = {
        "options": options | changed,
        "plan": asdict(plan),
        "clock": clock,
        "base_model": base.name,
        "layers": counts,
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    builder = Builder()
    for number, row in enumerate(rows):
        builder.add(row, number)
    builder.build().save(folder, "rows")


def _measure(folder: Path, processes: int) -> dict[str, Any]:
    """Return the figures of the slowest of some processes that train what a folder has. Raises ProbeError."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "lora_alpaca.training.estimating.measuring", str(folder), str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    said = [process.communicate()[0] for process in started]
    if failed := [text for process, text in zip(started, said, strict=True) if process.returncode]:
        raise ProbeError((failed[0].strip().splitlines() or ["no word"])[-1])
    found = [json.loads((folder / f"figures-{number}.json").read_text(encoding="utf-8")) for number in range(processes)]
    slowest: dict[str, Any] = max(found, key=lambda one: one["depths"][0]["seconds"]["step"])
    return slowest
