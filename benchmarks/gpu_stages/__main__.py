"""Run one stage: python benchmarks/gpu_stages NAME DEVICE TINY FOLDER"""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for the folder of the stages, whose names others have too
    from gpu_stages.stage import Stage

    importlib.import_module(f"gpu_stages.{sys.argv[1]}").run(Stage(*sys.argv[1:]))
