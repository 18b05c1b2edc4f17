"""The rows that a run names: to train on, and to validate on where they are files of their own. No torch is needed."""

from dataclasses import dataclass

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data import Rows
from lora_alpaca.errors import ConfigError, DataError


@dataclass(frozen=True)
class RunRows:
    """The rows of --data_path, and those of --val_data_path; without the latter, some of the former are held out."""

    train: Rows
    validation: Rows | None = None

    @property
    def parts(self) -> list[Rows]:
        """Return the rows of every flag."""
        return [self.train] if self.validation is None else [self.train, self.validation]

    @property
    def digests(self) -> dict[str, str | None]:
        """Return a sha256 of all texts of each, under its name in the record."""
        return {
            "data_sha256": self.train.digest,
            "val_data_sha256": self.validation.digest if self.validation is not None else None,
        }

    @property
    def revisions(self) -> dict[str, str]:
        """Return name -> commit of every dataset of the hub among them."""
        return {name: commit for rows in self.parts for name, commit in rows.revisions.items()}


def read_rows(config: FinetuneConfig) -> RunRows:
    """Return the rows that a config names, read once and checked.

    Raises DataError naming file and row, and ConfigError where --val_set_size asks for other rows to validate on.
    """
    train = Rows(config.data_path, config.columns, config.skip_bad_rows, config.ignore_fields)
    if not config.val_data_path:
        return RunRows(train)
    try:
        validation = Rows(config.val_data_path, config.columns, config.skip_bad_rows, config.ignore_fields)
    except DataError as error:  # data is read by code that knows one flag
        raise DataError(str(error).replace("--data_path", "--val_data_path")) from None
    if config.val_set_size not in (None, len(validation)):
        raise ConfigError(
            f"--val_set_size {config.val_set_size:g} holds out rows of --data_path, and --val_data_path "
            f"{config.val_data_path} names {len(validation)} rows to validate on; leave one of the two out"
        )
    return RunRows(train, validation)
