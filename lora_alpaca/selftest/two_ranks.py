"""Two processes on this machine, started by torchrun as a user would, that make one run after the other.

    python -m torch.distributed.run --standalone --nproc_per_node=2 -m lora_alpaca.selftest.two_ranks RUNS

RUNS is a JSON file of the options of each run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.errors import RankError, TrainingError
from lora_alpaca.selftest.finding import NotApplicable

ERROR = "error: "  # how the line of a rank that failed begins
LIMIT = 1800  # seconds; --rank_timeout ends a run before


class TwoRanks:
    """Two processes at work in the background; `where` says on what and over what."""

    def __init__(self, folder: Path, runs: list[dict[str, Any]], where: str):
        import torch

        if not torch.distributed.is_available():
            raise NotApplicable("this torch is built without processes that work together")
        self.where = f"two processes on {where}"
        self._output, file = folder / "ranks.txt", folder / "ranks.json"
        file.write_text(json.dumps(runs), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, "-m", __name__, str(file)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

    def wait(self, name: str) -> None:
        """Wait until the processes have ended. Raises TrainingError with what they said, unless the run is there."""
        code = self._process.wait(LIMIT)
        said = self._output.read_text(errors="replace").splitlines()
        if f"done: {name}" not in said:
            reason = next((line for line in said if line.startswith(ERROR)), f"{ERROR}no error was said")
            raise TrainingError(f"two processes ended with exit code {code}: {reason.removeprefix(ERROR)}")

    def close(self) -> None:
        """End the processes."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(40)  # torchrun ends its ranks, and kills after 30 seconds what does not end
            except subprocess.TimeoutExpired:
                self._process.kill()


def main() -> None:
    """Make the runs of a file, and say which are done."""
    from lora_alpaca.training import finetune

    for options in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            finetune(FinetuneConfig(**options))
        except Exception as error:
            line = " ".join(str(error).split()) or type(error).__name__
            print(f"{ERROR}{line}", flush=True)
            if isinstance(error, RankError):  # the other rank is gone
                raise
            raise SystemExit(1) from None
        if os.environ["RANK"] == "0":
            print(f"done: {Path(options['output_dir']).name}", flush=True)


if __name__ == "__main__":
    main()
