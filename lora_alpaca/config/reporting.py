"""The options of the commands that read the reports of runs."""

from typing import ClassVar

from lora_alpaca.config.options import Options, option


class ReportConfig(Options):
    """Draw report.html and report.md of a run anew, from what it wrote down: report RUN."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    run: str = option(..., "runs", "Output folder of a run.", auto="none, it is required")


class CompareConfig(Options):
    """Compare two runs: what differed in their options and data, and what came of it: compare RUN_A RUN_B."""

    positional: ClassVar[tuple[str, ...]] = ("run_a", "run_b")

    run_a: str = option(..., "runs", "Output folder of a run.", auto="none, it is required")
    run_b: str = option(..., "runs", "Output folder of another one.", auto="none, it is required")
    html: str | None = option(None, "runs", "Write a web page with both curves to this file.", auto="the terminal")
