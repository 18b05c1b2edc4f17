"""The options of everything that comes after training: answering, merging, converting, looking at rows."""

from typing import ClassVar, Self

from pydantic import model_validator

from lora_alpaca.common_options import ADAPTER_DIR, EXPORT_DIR, DataOptions, ModelOptions
from lora_alpaca.errors import ConfigError
from lora_alpaca.options import Device, Dtype, Finite, Names, Options, option


class GenerateConfig(ModelOptions):
    """Answer instructions: once, in a terminal chat, or on a web page."""

    load_8bit: bool | None = option(None, "precision", "Hold the base in 8 bits (LLM.int8).", auto="False")
    base_model: str = option(
        "",
        "model and data",
        "Base model, merged model, or `demo`; the variable BASE_MODEL counts too.",
        auto="the base that the adapter records",
    )
    lora_weights: str = option(
        "",
        "model and data",
        "Adapter folder, or its hub id; `none` answers with the base alone.",
        auto=f"{ADAPTER_DIR}, if it was made for the base model",
    )
    prompt_template: str = option(
        "", "model and data", "Prompt template: a name, or a path.", auto="the one that the adapter records"
    )
    instruction: str | None = option(None, "what to answer", "Answer this instruction and leave.", auto="the web page")
    input: str = option("", "what to answer", "Input that goes with --instruction.")
    system: str = option("", "what to answer", "System message, for templates that have one.")
    chat: bool = option(False, "what to answer", "Read instructions from the terminal, one a line.")
    server_name: str = option("127.0.0.1", "web page", "Address to listen on; 0.0.0.0 opens it to the network.")
    server_port: int | None = option(
        None, "web page", "Port to listen on.", auto="7860, or the next free one", ge=1, le=65535
    )
    share_gradio: bool = option(False, "web page", "Ask Gradio for a public link to the page.")
    temperature: Finite = option(
        0.1, "sampling", "Sampling temperature; 0 always takes the likeliest token.", ge=0, le=10
    )
    top_p: Finite = option(0.75, "sampling", "Sample from the likeliest tokens that make up this share.", gt=0, le=1)
    top_k: int = option(
        40, "sampling", "Sample from so many of the likeliest tokens; 0 is no limit.", unit="tokens", ge=0
    )
    num_beams: int = option(1, "sampling", "Beams of the search; 1 is plain sampling.", unit="beams", ge=1, le=16)
    max_new_tokens: int = option(128, "sampling", "Longest answer.", unit="tokens", ge=1)
    seed: int | None = option(
        None, "sampling", "Seed of the sampling.", auto="another answer every time", ge=0, lt=2**32
    )

    @model_validator(mode="after")
    def _one_mode(self) -> Self:
        if self.chat and self.instruction is not None:
            raise ConfigError("--chat and --instruction exclude each other; choose one")
        if self.input and self.instruction is None:
            raise ConfigError("--input goes with --instruction, which is missing")
        return self


class ExportConfig(Options):
    """Merge an adapter into its base and save an ordinary transformers model."""

    base_model: str = option(
        "",
        "model and data",
        "Base model: a folder, a hub id, or `demo`; the variable BASE_MODEL counts too.",
        auto="the base that the adapter records",
    )
    revision: str | None = option(
        None, "model and data", "Branch, tag or commit of the base model.", auto="the commit that the adapter records"
    )
    trust_remote_code: bool = option(
        False, "model and data", "Run Python code that the base model's repository brings."
    )
    lora_weights: str = option(ADAPTER_DIR, "model and data", "Adapter folder.")
    output_dir: str = option(EXPORT_DIR, "model and data", "Folder for the merged model.")
    prompt_template: str = option(
        "", "model and data", "Prompt template: a name, or a path.", auto="the one that the adapter records"
    )
    dtype: Dtype = option(
        "auto", "precision", "Dtype of the saved weights; auto is the one that the base is stored in."
    )
    device: Device = option("auto", "precision", "Where to merge; auto is the CPU.")
    overwrite: bool = option(False, "saving", "Remove what an earlier export left in --output_dir.")


class ShowConfig(DataOptions):
    """Show rows as the tokens that training sees: which are learned, which are not, and what was lost."""

    base_model: str = option(
        "", "model and data", "Model whose tokenizer is used: a folder, a hub id, or `demo`.", auto="demo"
    )
    revision: str | None = option(None, "model and data", "Branch, tag or commit of a model from the hub.", auto="main")
    trust_remote_code: bool = option(False, "model and data", "Run Python code that the model's repository brings.")
    row: Names = option(["1"], "what to show", "Which rows: their numbers in the order of the data, from 1.")
    html: str | None = option(
        None,
        "what to show",
        "Write a web page of the rows to this file; without --row, of the first 100.",
        auto="the terminal",
    )


class ConvertConfig(Options):
    """Turn an old adapter_model.bin, read as tensors only, into safetensors: convert_adapter OLD NEW."""

    places: ClassVar[tuple[str, ...]] = ("old", "new")

    old: str = option(..., "model and data", "Folder of the old adapter, or its hub id.", auto="none, it must be said")
    new: str = option(
        ..., "model and data", "Folder for the new one; it must not be there.", auto="none, it must be said"
    )
