"""Where and in what form a benchmark leaves its figures: benchmarks/results/NAME-DATE.json."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import run_record

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return what the figures depend on: the processor, its cores, and the GPU if there is one."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu}


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write the figures with date, machine and versions, and return the file."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = RESULTS / f"{name}-{date}.json"
    whole = {"date": date, "machine": machine(), "versions": run_record.versions(), **figures}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return path
