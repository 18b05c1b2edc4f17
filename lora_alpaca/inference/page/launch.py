"""The page served: its address, what its server is told, and what it says on the terminal."""

import os
import sys
from threading import Event
from urllib.parse import urlsplit

from starlette.middleware import Middleware

from lora_alpaca.config import GenerateConfig
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference.addresses import listen
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.host_names import own_names
from lora_alpaca.inference.page.layout import build
from lora_alpaca.inference.page.theme import CSS, THEME
from lora_alpaca.inference.page_guard import PageGuard

PORTS = range(7860, 7960)  # tried in turn when none is asked for


def launch(generator: Generator, config: GenerateConfig) -> None:
    """Serve the page until the process is interrupted. Raises ConfigError for an address that cannot be listened on."""
    opened = listen(config.server_name, config.server_port, PORTS)
    opened.socket.close()  # gradio opens its own
    port, is_private = opened.port, opened.is_private and not config.share_gradio
    page = build(generator, config, is_private)
    names = own_names(config.server_name)
    host = f"[{config.server_name}]" if ":" in config.server_name else config.server_name
    if not is_private:
        print("warning: the page has no password; whoever reaches its address can use it", file=sys.stderr)
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, [direct, "localhost", config.server_name]))  # gradio calls the page
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=config.share_gradio,
            theme=THEME,
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            allowed_paths=[],
            max_threads=40 + 4 * config.max_batch,  # an answer that is waited for holds one
            max_file_size="1kb",  # the page takes no files
            ssr_mode=False,
            mcp_server=False,
            quiet=True,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(PageGuard, host=config.server_name, names=names)]},
        )
    except OSError as error:
        raise ConfigError(f"--server_name {config.server_name} --server_port {port}: {error}") from error
    names |= {urlsplit(page.share_url).hostname or ""} if page.share_url else set()
    print(f"listening on {page.local_url} (Ctrl+C stops)", file=sys.stderr)
    try:
        Event().wait()
    finally:
        page.close(verbose=False)
