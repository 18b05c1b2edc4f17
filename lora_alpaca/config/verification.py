"""The options of verifying what is served."""

from typing import ClassVar, Self

from pydantic import model_validator

from lora_alpaca.config.options import Finite, Options, option
from lora_alpaca.config.shared import ADAPTER_DIR, EXPORT_DIR
from lora_alpaca.errors import ConfigError


class VerifyConfig(Options):
    """Ask a server whether it answers as the model that was trained: verify ENDPOINT."""

    positional: ClassVar[tuple[str, ...]] = ("endpoint",)

    endpoint: str = option(
        "",
        "server",
        "Address of an OpenAI-compatible server, such as http://localhost:8000.",
        auto="none, it is required",
    )
    model: str = option("", "server", "Name that the server knows the model by.", auto="the only one that it lists")
    receipt: str = option(
        "",
        "server",
        "Exported folder, which holds served_receipt.json.",
        auto=f"{EXPORT_DIR}, or {ADAPTER_DIR} if that is not there",
    )
    api_key_file: str = option("", "server", "File that holds the server's key.", auto="the variable OPENAI_API_KEY")
    timeout: Finite = option(120.0, "server", "Longest wait for an answer.", unit="seconds", gt=0)

    @model_validator(mode="after")
    def _needs_an_endpoint(self) -> Self:
        if not self.endpoint:
            raise ConfigError("--endpoint is missing: name the server, as in --endpoint http://localhost:8000")
        return self
