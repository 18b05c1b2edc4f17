"""The options of the command that finds a learning rate."""

from typing import Self

from pydantic import model_validator

from lora_alpaca.config.options import option
from lora_alpaca.config.training import FinetuneConfig
from lora_alpaca.errors import ConfigError


class FindConfig(FinetuneConfig):
    """Find the learning rate of a run by short ones on its rows; takes the flags of finetune, and makes no adapter."""

    svg: str = option(
        "", "progress and saving", "File for the curve, which must not be there.", auto="none", decides="nothing"
    )

    @model_validator(mode="after")
    def _asks_for_a_rate(self) -> Self:
        for name in ("learning_rate", "resume", "resume_from_checkpoint"):
            if self.is_set(name):
                raise ConfigError(f"--{name} is for finetune: find_lr finds the rate of a run that has not begun")
        return self

    def of_run(self) -> FinetuneConfig:
        """Return the config of the run whose rate is to be found."""
        said = {name: getattr(self, name) for name in self.model_fields_set & FinetuneConfig.model_fields.keys()}
        return FinetuneConfig(**said | {"learning_rate": "auto"})
