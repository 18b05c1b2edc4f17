"""The options of generation."""

from typing import ClassVar, Self

from pydantic import model_validator

from lora_alpaca.config.options import AutoBool, Finite, Names, option
from lora_alpaca.config.shared import ADAPTER_DIR, ModelOptions, SamplingOptions
from lora_alpaca.errors import ConfigError


class GenerateConfig(SamplingOptions, ModelOptions):
    """Answer instructions: one, a file of them, in a terminal chat, over OpenAI's API, or on a web page."""

    wording: ClassVar[dict[str, dict[str, str]]] = {
        "load_8bit": {"help": "Hold the base in 8 bits (LLM.int8).", "auto": "False"},
        "base_model": {
            "help": "Base model, merged model, or `demo`; the variable BASE_MODEL counts too.",
            "auto": "the base that the adapter records",
        },
    }

    lora_weights: str = option(
        "",
        "model and data",
        "Adapter folder, or its hub id, or several on one base with commas between, each answering under its folder's "
        "name; `none` answers with the base alone.",
        auto=f"{ADAPTER_DIR}, if it was made for the base model",
    )
    prompt_template: str = option(
        "", "model and data", "Prompt template: a name, or a path.", auto="the one that the adapter records"
    )
    merge_adapter: AutoBool = option(
        "auto",
        "precision",
        "Add the adapter to the weights in memory, which is faster: auto does so where the weights are not quantised, "
        "there is one adapter, and rounding leaves its change whole.",
    )
    instruction: str | None = option(None, "what to answer", "Answer this instruction and leave.", auto="the web page")
    input: str = option("", "what to answer", "Input that goes with --instruction.")
    system: str = option("", "what to answer", "System message, for templates that have one.")
    data_path: str = option(
        "", "what to answer", "Answer every row of a file, in any format of finetune; answers in it are left aside."
    )
    output_file: str = option("", "what to answer", "Where the answers to --data_path go, a line of JSON each.")
    columns: Names | None = option(
        None, "what to answer", "Names of the fields in --data_path: FIELD=COLUMN pairs, as for finetune.", auto="none"
    )
    ignore_fields: Names | None = option(
        None, "what to answer", "Fields of rows that carry meaning and are to go unused, as for finetune.", auto="none"
    )
    chat: bool = option(False, "what to answer", "Talk in the terminal; /help there says what can be said.")
    serve: bool = option(False, "what to answer", "Serve OpenAI's API: chat, completions, models.")
    server_name: str = option("127.0.0.1", "page and API", "Address to listen on; 0.0.0.0 opens it to the network.")
    server_port: int | None = option(
        None,
        "page and API",
        "Port to listen on.",
        auto="7860, or 8000 for --serve, or the next free one",
        ge=1,
        le=65535,
    )
    api_key_file: str = option(
        "",
        "page and API",
        "File whose first line is the key that --serve asks for; the variable LORA_ALPACA_API_KEY counts too.",
        auto="no key; one is needed to listen on the network",
    )
    max_batch: int = option(
        32, "page and API", "Most answers that are made at the same time.", unit="answers", ge=1, le=1024
    )
    max_waiting: int = option(
        128, "page and API", "Most requests of --serve that wait for their turn; then 429.", unit="requests", ge=0
    )
    share_gradio: bool = option(False, "page and API", "Ask Gradio for a public link to the page.")
    temperature: Finite = option(
        0.1, "sampling", "Sampling temperature; 0 always takes the likeliest token.", ge=0, le=10
    )
    max_new_tokens: int = option(128, "sampling", "Longest answer.", unit="tokens", ge=1)
    stop: Names | None = option(None, "sampling", "Texts that end an answer and are not shown.", auto="none")
    seed: int | None = option(
        None, "sampling", "Seed of the sampling.", auto="another answer every time", ge=0, lt=2**32
    )

    @model_validator(mode="after")
    def _one_mode(self) -> Self:
        modes = {
            "--instruction": self.instruction is not None,
            "--data_path": bool(self.data_path),
            "--chat": self.chat,
            "--serve": self.serve,
        }
        chosen = [name for name, asked in modes.items() if asked]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other; choose one")
        if self.input and self.instruction is None:
            raise ConfigError("--input goes with --instruction, which is missing")
        if bool(self.data_path) != bool(self.output_file):
            missing = "--output_file" if self.data_path else "--data_path"
            raise ConfigError(f"--data_path and --output_file go together, and {missing} is missing")
        return self
