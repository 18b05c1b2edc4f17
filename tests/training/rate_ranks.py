"""A rank that searches the rates of some runs, its clock the faster the higher its number, and notes what it found."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from lora_alpaca.config import FindConfig
from lora_alpaca.training.search.finding import find_lr

if __name__ == "__main__":
    runs, rank, clock = json.loads(sys.argv[1]), int(os.environ["RANK"]), time.perf_counter
    time.perf_counter = lambda: (1 + 2 * rank) * clock()
    found = [find_lr(FindConfig(**options)) for options in runs]
    noted = [{"rate": one.rate, "trials": one.trials} for one in found]
    (Path(sys.argv[2]) / f"rank{rank}.json").write_text(json.dumps(noted, default=asdict))
