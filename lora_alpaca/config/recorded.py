"""The options that a record holds: those that make the run again."""

from collections.abc import Mapping
from typing import Any

from lora_alpaca.config.training import FinetuneConfig

FOLDERS = {"output_dir", "export_dir"}  # which a run makes, and another one must not
BY_HAND = {"trust_remote_code"}  # never by a file that may have come from elsewhere
ONE_COMMAND = {"resume", "resume_from_checkpoint", "allow_change", "overwrite"}  # of no meaning in another command


def options_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that make the run of a record, in the order of `--help`.

    Those that the user set, those that the run chose for its base and data, and those whose default has changed since.
    """
    options, said = record["options"], record["said"]
    return {
        name: options[name]
        for name, field in FinetuneConfig.model_fields.items()
        if name in options and options[name] is not None and (name in said or options[name] != field.default)
        if name not in ONE_COMMAND
    }
