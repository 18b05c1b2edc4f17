"""The options of the estimate of a run: those of the run, and where it is to be."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from lora_alpaca.config.options import Finite, lower, option
from lora_alpaca.config.shared import JsonOption
from lora_alpaca.config.training import FinetuneConfig

DeviceName = Literal[
    "here", "t4", "rtx3060", "rtx3090", "rtx4090", "rtx5090", "a10", "l4", "a100-40", "a100-80", "h100", "h200",
    "m1", "m1-max", "m1-ultra", "cpu-32",
]  # fmt: skip


class EstimateConfig(JsonOption, FinetuneConfig):
    """Say what a run would take: memory by part, time, money and disk, with the flags of finetune."""

    wording: ClassVar[dict[str, dict[str, str]]] = FinetuneConfig.wording | {
        "json": {"help": "Print the estimate as JSON."},
    }

    on: Annotated[DeviceName, BeforeValidator(lower)] = option(
        "here", "estimate", "The device to estimate for: this machine, measured, or one of the table in docs/cost.md."
    )
    devices: int = option(1, "estimate", "How many such devices the run has.", unit="devices", ge=1)
    rows: int | None = option(
        None, "estimate", "Rows of the data, where it is not at hand.", unit="rows", auto="those of the data", ge=1
    )
    mean_tokens: Finite | None = option(
        None,
        "estimate",
        "Mean length of a row, where the data or its tokenizer is not at hand.",
        unit="tokens",
        auto="as counted, or --cutoff_len",
        ge=2,
    )
    probe: bool = option(
        True, "estimate", "Measure time and memory on a few layers of the model; without it both are by formulas."
    )

    @property
    def run(self) -> FinetuneConfig:
        """Return the options of the run."""
        names = self.model_fields_set & set(FinetuneConfig.model_fields)
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return FinetuneConfig(**options)
