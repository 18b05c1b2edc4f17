"""A `generation_config.json` that transformers refuses, mended: it saves none whose values contradict each other."""

import re
from typing import Any

import transformers

from lora_alpaca.models.base import without_report

FILE = "generation_config.json"


def mended(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a generation config as transformers takes it, and a note on what is changed.

    Values for sampling are kept, and sampling is switched on, which is what servers do with them; other values that
    have no effect are left out.
    """
    if not (reason := _refusal(content)):
        return content, []
    named = re.findall(r"^- `(\w+)`", reason, re.MULTILINE)
    sampling = content | {"do_sample": True}
    if not _refusal(sampling):
        said = f"it has {', '.join(named)} without do_sample, which transformers refuses; do_sample is true now"
        return sampling, [f"{FILE}: {said}"]
    kept = {key: value for key, value in content.items() if key not in re.findall(r"`(\w+)`", reason)}
    if _refusal(kept):
        kept = {key: value for key, value in content.items() if key.endswith("_token_id")}
    left = ", ".join(sorted(content.keys() - kept.keys()))
    return kept, [f"{FILE}: transformers refuses it ({_first_line(reason)}); left out: {left}"]


def _refusal(content: dict[str, Any]) -> str:
    """Return why transformers would not save a generation config, or nothing."""
    try:
        with without_report():
            transformers.GenerationConfig.from_dict(content).validate(strict=True)
    except Exception as error:  # a value of another type makes it raise whatever its comparison raises
        return str(error) or type(error).__name__
    return ""


def _first_line(reason: str) -> str:
    lines = [line.strip(" -") for line in reason.splitlines() if not line.rstrip().endswith(":")]
    return (lines or [reason])[0].removesuffix(".")
