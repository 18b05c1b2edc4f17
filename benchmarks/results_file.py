"""Where and in what form a benchmark leaves its figures: benchmarks/results/NAME-DATE.json."""

import datetime
import json
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import run_record
from lora_alpaca.models import hardware

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return what the figures depend on: the processor, its cores, and the GPU if there is one."""
    found = hardware.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {"cpu": found["processor"] or found["machine"], "cores": found["cores"], "gpu": found["gpu"]}


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write the figures with date, machine and versions, and return the file."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = RESULTS / f"{name}-{date}.json"
    whole = {"date": date, "machine": machine(), "versions": run_record.versions(), **figures}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return path
