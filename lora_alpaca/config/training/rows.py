"""The options of a run on its folder and its rows."""

from lora_alpaca.config.options import Finite, Options, option
from lora_alpaca.config.shared import ADAPTER_DIR


class RowOptions(Options):
    """Where the result goes, which rows are held out, and how many may be lost."""

    output_dir: str = option(
        ADAPTER_DIR, "model and data", "Folder for the adapter and its checkpoints.", decides="nothing"
    )
    val_data_path: str = option(
        "",
        "data",
        "Rows to validate on, named as --data_path names rows; those of --data_path are then all trained on.",
        auto="rows of --data_path, as --val_set_size says",
        same_if="val_data_sha256",
    )
    val_set_size: Finite | None = option(
        None,
        "data",
        "Rows held out for validation; below 1 it is a share of the rows, 0 turns validation off.",
        unit="rows",
        auto="2000, at most a tenth of the rows",
        ge=0,
    )
    max_truncated: Finite | None = option(
        None,
        "data",
        "Largest share of rows that may be truncated; more is an error.",
        auto="no limit",
        ge=0,
        le=1,
        decides="nothing",
    )
    max_dropped: Finite | None = option(
        None,
        "data",
        "Largest share of rows that may be dropped, for whatever reason.",
        auto="no limit",
        ge=0,
        le=1,
        decides="nothing",
    )
    max_duplicates: Finite | None = option(
        None,
        "data",
        "Largest share of rows that may be exact doubles of others.",
        auto="no limit",
        ge=0,
        le=1,
        decides="nothing",
    )
    cache_dir: str = option(
        "",
        "data",
        "Folder for prepared rows, used again when nothing has changed; `none` keeps none.",
        auto="lora_alpaca in $XDG_CACHE_HOME or ~/.cache, for 5000 rows or more",
        decides="nothing",
    )
