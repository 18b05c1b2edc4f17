"""Draws the report of a run anew: from the facts that it wrote, and the result in its record where that came later."""

from typing import Any

from lora_alpaca.artifacts import privacy
from lora_alpaca.config import ReportConfig
from lora_alpaca.errors import visible
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import OutputFolder, read_record
from lora_alpaca.storage.paths import user_path
from lora_alpaca.training.report import files
from lora_alpaca.training.report.drawing import drawn


def report(config: ReportConfig) -> None:
    """Write report.html and report.md of a run anew. Raises FolderError where there are no facts of one."""
    folder = OutputFolder(user_path(config.run))
    facts = files.read_facts(folder.real)
    with folder.locked(), folder.disk_errors_named():
        atomic.remove_hidden(folder.real, of=files.KIND)  # what a run left that was killed in its last report
        known = up_to_date(facts, privacy.whole(folder.real, read_record(folder.real)))
        files.write(folder.real, drawn(known, config.run))
    print(f"{visible(str(folder.path / files.PAGE))} and {files.TEXT} are drawn anew")


def up_to_date(facts: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a run with the result of its record, where that run ended after its last report."""
    result = record.get("result")
    if not isinstance(result, dict) or record.get("run") != facts["run"] or facts["status"] == "finished":
        return facts
    validation = {"first": result["first_validation_loss"], "best": result["validation_loss"]}
    return {
        **facts,
        "status": "finished",
        "step": result["steps"],
        "seconds": result["seconds"],
        "history": result["history"],
        "validation": {**validation, "best_step": result["best_step"] or 0},
    }
