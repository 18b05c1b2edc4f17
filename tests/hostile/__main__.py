"""Change folders ten thousand times in process and two hundred times before whole commands: python tests/hostile.

The figures go to benchmarks/results.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    sys.path[0] = str(TESTS)
    sys.path.insert(0, str(TESTS.parent))
    import conftest  # noqa: F401  the environment of all tests, before any library is imported

    from hostile.mutations import Folders, Report, commands, in_process

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in_process", type=int, default=10_000)
    parser.add_argument("--commands", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=TESTS.parent / "benchmarks" / "results")
    given = parser.parse_args()
    report, begun = Report(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lora-alpaca-hostile-") as place:
        folders = Folders(Path(place))
        in_process(folders, given.in_process, report, given.seed)
        commands(folders, given.commands, report, given.seed)
    told = {
        "command": f"python tests/hostile --in_process {given.in_process} --commands {given.commands} "
        f"--seed {given.seed}",
        "counts": dict(sorted(report.counts.items())),
        "faults": report.faults,
        "slowest_case_seconds": round(report.slowest, 1),
        "most_memory_megabytes": round(report.megabytes),
        "seconds": round(time.monotonic() - begun),
    }
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / f"hostile-{time.strftime('%Y-%m-%d')}.json").write_text(json.dumps(told, indent=2) + "\n")
    print(*report.faults, sep="\n")
    print(json.dumps({key: value for key, value in told.items() if key != "faults"}))
    os._exit(bool(report.faults))
