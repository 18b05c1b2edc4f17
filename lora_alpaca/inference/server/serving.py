"""`generate --serve`: checks what fails cheaply, listens, loads, answers, and ends in order."""

import os
import sys

from lora_alpaca.config import GenerateConfig
from lora_alpaca.errors import ConfigError, visible
from lora_alpaca.inference.addresses import listen
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.server.app import build
from lora_alpaca.inference.server.listening import Listening
from lora_alpaca.inference.server.service import Service
from lora_alpaca.storage.paths import user_path

PORTS = range(8000, 8100)  # tried in turn when none is asked for
KEY = "LORA_ALPACA_API_KEY"
GRACE = 2.5  # seconds that answers may take after a signal; with what follows it stays below 5


def serve(config: GenerateConfig) -> None:
    """Serve the API until a signal. Raises ConfigError before the model is loaded, and what loading it raises."""
    key = read_key(config.api_key_file)
    opened = listen(config.server_name, config.server_port, PORTS)
    if not opened.is_private and not key:
        opened.socket.close()
        raise ConfigError(
            f"--server_name {config.server_name}: on a network the API needs a key; name a file that holds one by "
            f"--api_key_file, or set the variable {KEY}"
        )
    service = Service(config)
    most_connections = 64 + 2 * service.admission.capacity
    with Listening(build(service, config.server_name, key), opened.socket, most_connections) as listening:
        generator = Generator.load(config)
        service.open(generator)
        host = f"[{config.server_name}]" if ":" in config.server_name else config.server_name
        models = ", ".join(entry["id"] for entry in service.models.listing()["data"])
        print(
            visible(f"serving {models} on http://{host}:{opened.port}/v1 (Ctrl+C stops)"), file=sys.stderr, flush=True
        )
        try:
            listening.wait()
        except KeyboardInterrupt as stop:
            cut = listening.run(service.drain(GRACE), seconds=GRACE + 2)
            stop.args = (f"{cut} answers were cut short" if cut else "every answer was complete",)
            raise
        finally:
            generator.close()
    raise ConfigError("the server ended by itself")  # the thread that serves has failed


def read_key(file: str) -> str:
    """Return the key in the first line of a file, or in the environment, empty if neither is named.

    Raises ConfigError for a file without one, and for a key that no header can hold.
    """
    where, key = (f"--api_key_file {file}", "") if file else (f"the variable {KEY}", os.environ.get(KEY, ""))
    if file:
        try:
            with user_path(file).open(encoding="utf-8") as opened:
                key = opened.readline(10_000).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or 'is no text'}") from None
        if not key:
            raise ConfigError(f"{where}: its first line is empty; write the key there")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where}: a key is made of letters, digits and signs of ASCII, without spaces")
    return key
