"""What the self-test shows: what is under way, a line for each check, and the same as JSON."""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from lora_alpaca.errors import visible
from lora_alpaca.selftest.checks import CHECKS, Check, Result

ROW = "{:9} {:15} {:>9} {:>9}  {:>6}  {}"
INDENT = " " * 10


class Table:
    """The results, one line each; with `as_json` nothing but JSON is printed, at the end."""

    def __init__(self, names: Sequence[str], as_json: bool):
        self._names, self._as_json = names, as_json
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty()

    def head(self, facts: dict[str, Any]) -> None:
        """Print what is tested."""
        if not self._as_json:
            versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
            self._print(f"{facts['base_model']}, {facts['precision']}, {facts['threads']} threads", versions, "")
            self._print(ROW.format("", "check", "measured", "limit", "time", "what has to hold"))

    @contextmanager
    def under_way(self, name: str) -> Iterator[None]:
        """Say on stderr which check is being made: in place on a terminal, else in a line."""
        text = f"{self._names.index(name) + 1}/{len(self._names)} {name}: {CHECKS[name].promise}"
        if self._on_terminal:
            print(f"\r\x1b[K{text} ...", end="", file=sys.stderr, flush=True)
        elif self._as_json:
            print(text, file=sys.stderr, flush=True)
        try:
            yield
        finally:
            if self._on_terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def add(self, result: Result) -> None:
        """Print the line of a result, and beneath it why it is no good."""
        if self._as_json:
            return
        check = CHECKS[result.name]
        figures = (_figure(result.measured), _figure(result.limit), f"{result.seconds:.1f} s")
        self._print(ROW.format(result.status, result.name, *figures, check.promise))
        if result.note and result.status != "ok":
            self._print(f"{INDENT}{result.note}")

    def end(self, facts: dict[str, Any], results: Sequence[Result], seconds: float) -> None:
        """Print the sum of the results, or all of it as JSON."""
        count = Counter(result.status for result in results)
        if not self._as_json:
            others = "".join(f", {count[status]} {status}" for status in ("failed", "left out") if count[status])
            self._print("", f"{count['ok']} of {len(results)} checks passed{others}, in {seconds:.0f} s")
            return
        checks = [_finite(asdict(result)) | _meaning(CHECKS[result.name]) for result in results]
        whole = facts | {"passed": not count["failed"], "seconds": round(seconds, 1), "checks": checks}
        self._print(json.dumps(whole, indent=2, ensure_ascii=False))

    def _print(self, *lines: str) -> None:
        for line in lines:
            print(visible(line), flush=True)


def _figure(number: float | None) -> str:
    if number is None:
        return "-"
    return str(number) if isinstance(number, int) else f"{number:.1e}"


def _meaning(check: Check) -> dict[str, str]:
    return {"promise": check.promise, "measures": check.measures}


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts with None where a number is none, which JSON does not know."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in facts.items()
    }
