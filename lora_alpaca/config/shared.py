"""The options that several commands share: which data, which base model, on what device, in what precision."""

import warnings
from typing import Literal, Self

from pydantic import model_validator

from lora_alpaca.config.options import Device, Dtype, Finite, Names, Options, option
from lora_alpaca.errors import ConfigError

DEMO = "demo"  # the name of the base model and of the data inside the package
UPSTREAM_DATA = "yahma/alpaca-cleaned"
ADAPTER_DIR = "./lora-alpaca"
EXPORT_DIR = "./hf_ckpt"


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # of pydantic, which has a deprecated method of this name

    class JsonOption(Options):
        """Whether what a command found is printed for programs."""

        json: bool = option(False, "output", "Print the result as JSON.")  # type: ignore[assignment]


class BaseModelOptions(Options):
    """Which base model."""

    base_model: str = option(
        "",
        "model and data",
        "Base model: a local folder, a hub id, or `demo` for the tiny model in the package.",
        same_if="base_sha256",
    )
    revision: str | None = option(
        None,
        "model and data",
        "Branch, tag or commit of a base model from the hub; the commit is recorded.",
        auto="main",
        same_if="base_sha256",
    )
    trust_remote_code: bool = option(
        False, "model and data", "Run Python code that the base model's repository brings."
    )


class ModelOptions(BaseModelOptions):
    """Which base model, on what device, in what precision: the same for training and generation."""

    load_8bit: bool | None = option(
        None, "precision", "Hold the frozen base in 8 bits (LLM.int8).", auto="see the docs"
    )
    load_4bit: bool = option(False, "precision", "Hold the frozen base in 4 bits (NF4).")
    dtype: Dtype = option(
        "auto",
        "precision",
        "Compute dtype: auto, bf16, fp16 or fp32. auto is bf16 where the device has it, else fp16 on CUDA, else fp32.",
    )
    device: Device = option("auto", "precision", "Where to run: auto, cuda, mps or cpu.")

    @model_validator(mode="after")
    def _one_quantisation(self) -> Self:
        if self.load_8bit and self.load_4bit:
            raise ConfigError("--load_8bit and --load_4bit exclude each other; choose one")
        return self


class SamplingOptions(Options):
    """How the tokens of an answer are chosen."""

    top_p: Finite = option(0.75, "sampling", "Sample from the likeliest tokens that make up this share.", gt=0, le=1)
    top_k: int = option(
        40, "sampling", "Sample from so many of the likeliest tokens; 0 is no limit.", unit="tokens", ge=0
    )
    min_p: Finite = option(
        0.0, "sampling", "Sample from tokens that are at least this share as likely as the likeliest.", ge=0, le=1
    )
    repetition_penalty: Finite = option(
        1.0, "sampling", "Divide the score of tokens that were there before; 1 is none.", gt=0, le=10
    )
    num_beams: int = option(1, "sampling", "Beams of the search; 1 is plain sampling.", unit="beams", ge=1, le=16)


class DataOptions(Options):
    """Which rows, how they become prompts, and what of them is learned."""

    data_path: str = option(
        "",
        "data",
        "Rows: a .json, .jsonl, .csv, .tsv, .parquet or .arrow file, or a .txt or .md document, each also .gz; a "
        "folder or a pattern of such files; a folder of save_to_disk, FOLDER[:SPLIT]; a hub id, "
        "ID[:CONFIG][:SPLIT][@REVISION]; `demo`; or several with commas between.",
        auto=f"the demo data; {UPSTREAM_DATA} when --base_model is given",
        same_if="data_sha256",
    )
    columns: Names | None = option(
        None, "data", "Names of the fields in the data: FIELD=COLUMN pairs, as in instruction=question.", auto="none"
    )
    ignore_fields: Names | None = option(
        None,
        "data",
        "Fields of rows and turns that carry meaning (a weight, an image, a system prompt) and are to go unused.",
        auto="none; such a field is an error",
    )
    skip_bad_rows: bool = option(False, "data", "Leave out rows that cannot be used, and count them; else an error.")
    prompt_template_name: str = option(
        "",
        "data",
        "Prompt template: a name from templates/, `chat` for the tokenizer's own, or the path of a .json file.",
        auto="alpaca; for other formats of rows the one that fits, as a line then tells",
    )
    cutoff_len: int = option(512, "data", "Longest row.", unit="tokens", ge=2)
    overlong: Literal["truncate", "drop", "error"] = option(
        "truncate", "data", "Longer rows: truncate their answer, drop them, or an error; counted."
    )
    train_on_inputs: bool = option(False, "data", "Learn the prompts too, not only the answers.")
    train_on: Literal["all", "last"] = option("all", "data", "Which answers of a conversation are learned.")
    train_on_reasoning: bool = option(
        True, "data", "Learn the thoughts before the answers too; else they are only seen."
    )
    add_eos_token: bool = option(True, "data", "Learn to end the answer; without it answers do not stop.")
