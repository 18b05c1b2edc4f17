"""The options of the self-test."""

from typing import ClassVar, Self

from pydantic import model_validator

from lora_alpaca.config.options import Device, Dtype, Names, option
from lora_alpaca.config.shared import BaseModelOptions, JsonOption
from lora_alpaca.errors import ConfigError

CHECKS = (
    "labels", "end_token", "packing", "accumulation", "chunked_loss", "saved", "resume", "merge", "template",
    "quantised_save", "ranks", "sharding",
)  # fmt: skip


class SelftestConfig(JsonOption, BaseModelOptions):
    """Check on this machine, with the installed libraries, that runs are computed as they should be."""

    wording: ClassVar[dict[str, dict[str, str]]] = {
        "base_model": {
            "help": "Base model to test with: a local folder, a hub id that is in the cache, or `demo`; of a large "
            "one, its first layers.",
            "auto": "demo",
        },
        "json": {"help": "Print the results as JSON; what is under way is then said on stderr."},
    }

    dtype: Dtype = option(
        "fp32", "precision", "Compute dtype; fp32 shows what rounding hides in 16 bits. auto is as in training."
    )
    device: Device = option("auto", "precision", "Where to run: auto, cuda, mps or cpu.")
    only: Names | None = option(
        None, "what to check", f"Checks to make, with commas between: {', '.join(CHECKS)}.", auto="all"
    )

    @model_validator(mode="after")
    def _known_checks(self) -> Self:
        for name in self.only or []:
            if name not in CHECKS:
                raise ConfigError(f"--only {name}: not one of {', '.join(CHECKS)}")
        return self
