"""Run the tests of clients and keep what they found: python tests/clients [what pytest takes]

Each test says its figures by pytest's `record_property`. They go to benchmarks/results/clients-DATE.json, beside what
other tests found on that day.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import environments
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))


class Found:
    """A plugin of pytest that keeps the outcome and the figures of each test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = {"reason": report.longrepr[2]} if report.skipped and isinstance(report.longrepr, tuple) else {}
            name = report.nodeid.rpartition("clients/")[2]
            self.tests[name] = {"outcome": report.outcome, **reason, **dict(report.user_properties)}


def main(words: list[str]) -> int:
    """Run the tests, write what they found, and return pytest's exit code."""
    found = Found()
    code = pytest.main(["-m", "clients", *(words or [str(Path(__file__).parent)])], plugins=[found])
    from results_file import RESULTS, write  # what it imports, pytest would find imported before it

    today = RESULTS / f"clients-{datetime.now(UTC).date().isoformat()}.json"
    earlier = json.loads(today.read_text(encoding="utf-8"))["tests"] if today.is_file() else {}
    made = {name: lines for name, lines in environments.REQUIREMENTS.items() if environments.is_there(name)}
    tests = dict(sorted((earlier | found.tests).items()))
    print(write("clients", {"command": "make clients", "environments": made, "tests": tests}))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
