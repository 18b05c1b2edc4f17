"""A rank of a run with a budget: its clock goes faster the higher its number; it notes its steps and rates."""

import json
import os
import sys
from pathlib import Path

from lora_alpaca import FinetuneConfig
from lora_alpaca.planning.budget import Budget, Meter
from lora_alpaca.training.finetuning import train

if __name__ == "__main__":
    config, rank = FinetuneConfig(**json.loads(sys.argv[1]), max_minutes=0.5), int(os.environ["RANK"])
    seconds = [0.0]

    def now() -> float:
        seconds[0] += 0.3 * (1 + 2 * rank)
        return seconds[0]

    result = train(config, None, meter=Meter(Budget.of(config), 0.0, now))
    rates = [entry["learning_rate"] for entry in result.history if "learning_rate" in entry]
    noted = json.dumps({"steps": result.steps, "rates": rates})
    (Path(sys.argv[2]) / f"rank{rank}.json").write_text(noted)
