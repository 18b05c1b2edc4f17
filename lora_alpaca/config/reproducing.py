"""The options of a run that is made again."""

from typing import ClassVar, Literal

from lora_alpaca.config.options import Finite, option
from lora_alpaca.config.shared import JsonOption


class ReproduceConfig(JsonOption):
    """Train an adapter again, as its record says, and compare the two: reproduce ADAPTER."""

    positional: ClassVar[tuple[str, ...]] = ("adapter",)
    wording: ClassVar[dict[str, dict[str, str]]] = {
        "json": {"help": "Print what came of it as JSON; what is under way is then said on stderr."},
    }

    adapter: str = option(..., "run", "Output folder of a finished run; it is only read.", auto="none, it is required")
    output_dir: str = option("", "run", "Folder for the run that is made again.", auto="ADAPTER-reproduced")
    overwrite: bool = option(False, "run", "Remove what an earlier run of ours left in --output_dir.")
    base_model: str = option("", "where things are now", "The base of the run.", auto="where it was")
    data_path: str = option("", "where things are now", "The rows of the run.", auto="where they were")
    val_data_path: str = option(
        "", "where things are now", "Its rows to validate on, if they are a file of their own.", auto="where they were"
    )
    init_adapter: str = option(
        "", "where things are now", "The adapter that it started from, if it did.", auto="where it was"
    )
    trust_remote_code: bool = option(
        False, "where things are now", "Run Python code that the base brings, which is then named by --base_model."
    )
    device: Literal["", "auto", "cuda", "mps", "cpu"] = option(
        "", "where things are now", "Where to run: auto, cuda, mps or cpu.", auto="as the run was told"
    )
    tolerance: Finite = option(
        0.01,
        "comparison",
        "On other hardware, or with other versions, the largest difference of a validation loss that counts as the "
        "same run.",
        unit="nats per token",
        ge=0,
    )
