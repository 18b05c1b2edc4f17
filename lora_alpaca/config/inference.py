"""The options of generation."""

from typing import ClassVar, Self

from pydantic import model_validator

from lora_alpaca.config.options import Finite, option
from lora_alpaca.config.shared import ADAPTER_DIR, ModelOptions
from lora_alpaca.errors import ConfigError


class GenerateConfig(ModelOptions):
    """Answer instructions: once, in a terminal chat, or on a web page."""

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
