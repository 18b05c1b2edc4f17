"""The options of evaluating a model on rows that it was not trained on."""

from typing import ClassVar

from lora_alpaca.config.inference import GenerateConfig
from lora_alpaca.config.options import AutoBool, Finite, Names, option
from lora_alpaca.config.shared import ADAPTER_DIR, ModelOptions, SamplingOptions

EVALUATION_DIR = "./evaluation"


class EvaluateConfig(SamplingOptions, ModelOptions):
    """Answer held-out rows with the base and with the adapter, score both, and show them side by side."""

    wording: ClassVar[dict[str, dict[str, str]]] = GenerateConfig.wording

    lora_weights: str = option(
        "",
        "model and data",
        "Adapter folder, or its hub id, or several on one base with commas between; `none` is the model alone.",
        auto=f"{ADAPTER_DIR}, if it was made for the base model",
    )
    prompt_template: str = option(
        "", "model and data", "Prompt template: a name, or a path.", auto="the one that the adapter records"
    )
    data_path: str = option(
        "",
        "model and data",
        "Rows with answers, in any format of finetune.",
        auto="the rows that the adapter's run held out",
    )
    columns: Names | None = option(
        None, "model and data", "Names of the fields in --data_path: FIELD=COLUMN pairs, as for finetune.", auto="none"
    )
    ignore_fields: Names | None = option(
        None, "model and data", "Fields of rows that carry meaning and are to go unused, as for finetune.", auto="none"
    )
    max_rows: int | None = option(None, "model and data", "Only the first so many rows.", unit="rows", auto="all", ge=1)
    output_dir: str = option(EVALUATION_DIR, "model and data", "Folder for scores, answers and page.")
    overwrite: bool = option(False, "model and data", "Remove what an earlier evaluation left in --output_dir.")
    merge_adapter: AutoBool = option("auto", "precision", "Add the adapter to the weights in memory, as generate does.")
    max_batch: int = option(
        32, "precision", "Most answers that are made at the same time.", unit="answers", ge=1, le=1024
    )
    system: str = option("", "sampling", "System message for rows that have none, where the template has one.")
    temperature: Finite = option(
        0.0, "sampling", "Sampling temperature; 0 always takes the likeliest token.", ge=0, le=10
    )
    max_new_tokens: int = option(256, "sampling", "Longest answer.", unit="tokens", ge=1)
    stop: Names | None = option(None, "sampling", "Texts that end an answer and are not part of it.", auto="none")
    seed: int = option(42, "sampling", "Seed of the sampling; every row draws from its own.", ge=0, lt=2**32)

    def generating(self) -> GenerateConfig:
        """Return the options of generate that these are."""
        own = {"data_path", "columns", "ignore_fields"}  # which there are those of answering a file
        return GenerateConfig(
            **{
                name: value
                for name, value in self.model_dump().items()
                if name in GenerateConfig.model_fields and name not in own
            }
        )
