"""The web page: an instruction and its answer, with every sampling control beside them. The only module with gradio.

Nothing on it comes from elsewhere: system fonts, no analytics, no flagging, and it listens on this machine alone
unless it is told otherwise.
"""

import errno
import html
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr

from lora_alpaca.config import GenerateConfig
from lora_alpaca.config.shared import ADAPTER_DIR, DEMO
from lora_alpaca.errors import ConfigError, LoraAlpacaError
from lora_alpaca.inference.generator import Generator
from lora_alpaca.models.base import demo_base
from lora_alpaca.storage.paths import user_path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

TITLE = "LoRA Alpaca"
PORTS = range(7860, 7960)  # tried in turn when none is asked for
# Option: label, lowest, highest, step, what it does. A browser sends 1.0 as 1; the type of the step restores it.
SLIDERS: dict[str, tuple[str, float, float, float, str]] = {
    "temperature": ("Temperature", 0, 2, 0.01, "0 always takes the likeliest token"),
    "top_p": ("Top p", 0.01, 1, 0.01, "Draw from the likeliest share"),
    "top_k": ("Top k", 0, 100, 1, "Draw from so many; 0 is no limit"),
    "num_beams": ("Beams", 1, 8, 1, "Above 1: answers in one piece"),
    "max_new_tokens": ("Max tokens", 1, 2000, 1, "The answer stops there"),
}
THEME = gr.themes.Default(
    primary_hue="amber",
    neutral_hue="stone",
    font=("system-ui", "sans-serif"),
    font_mono=("ui-monospace", "monospace"),
).set(  # the theme's own greys and ambers are too light to read
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    slider_color="*primary_700",
    checkbox_background_color_selected="*primary_700",
    checkbox_border_color_selected="*primary_700",
    block_info_text_color="*neutral_500",
    block_info_text_color_dark="*neutral_400",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
)
CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
#stream { min-width: min(280px, 100%) !important; }
#head h1 { font-size: 1.6rem; margin: 0 0 0.2rem; }
#head p { color: var(--body-text-color-subdued); margin: 0; overflow-wrap: anywhere; }
"""


def build(generator: Generator, config: GenerateConfig) -> gr.Blocks:
    """Return the page, its controls at the values of the config. `THEME` and `CSS` go to its `launch`."""
    answers = _Answers(generator)
    page = gr.Blocks(title=TITLE, analytics_enabled=False)
    with page:
        gr.HTML(f"<h1>{TITLE}</h1><p>{html.escape(_described(generator, config))}</p>", elem_id="head")
        with gr.Row():
            with gr.Column(min_width=320):
                instruction = gr.Textbox("Tell me about alpacas.", label="Instruction", lines=3, max_lines=12)
                input = gr.Textbox(label="Input", placeholder="none", lines=3, max_lines=12)
                with gr.Row():
                    submit = gr.Button("Submit", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=120)
            with gr.Column(min_width=320):
                output = gr.Textbox(label="Output", lines=12, max_lines=24, interactive=False, buttons=["copy"])
        with gr.Row():
            sliders = [_slider(name, getattr(config, name)) for name in SLIDERS]
            stream = gr.Checkbox(True, label="Stream output", info="Off: shown when it is complete", elem_id="stream")
        gr.on(
            [submit.click, instruction.submit, input.submit],  # in a text box shift and enter submit
            answers.answer,
            [instruction, input, stream, *sliders],
            output,
            api_visibility="private",
            show_progress="minimal",
            concurrency_limit=1,  # as the generator, which gives one answer at a time
        )
        stop.click(answers.stop, queue=False, api_visibility="private", show_progress="hidden")
    return page


def launch(generator: Generator, config: GenerateConfig) -> None:
    """Serve the page until the process is interrupted. Raises ConfigError for an address that cannot be listened on."""
    port, is_private = _address(config.server_name, config.server_port)
    page = build(generator, config)
    host = f"[{config.server_name}]" if ":" in config.server_name else config.server_name
    if not is_private or config.share_gradio:
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
            max_file_size="1kb",  # the page takes no files
            ssr_mode=False,
            mcp_server=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ConfigError(f"--server_name {config.server_name} --server_port {port}: {error}") from error
    print(f"listening on {page.local_url} (Ctrl+C stops)", file=sys.stderr)
    try:
        Event().wait()
    finally:
        page.close(verbose=False)


class _Answers:
    """What the two buttons do."""

    def __init__(self, generator: Generator):
        self.generator = generator
        self.stopped: set[str | None] = set()  # sessions whose answer shall end here

    def answer(self, instruction: str, input: str, stream: bool, request: gr.Request, *values: float) -> Iterator[Any]:
        """Yield what the output box shows, from nothing to the whole answer."""
        self.stopped.discard(request.session_hash)
        shown = ""
        yield shown
        chosen: dict[str, Any] = {
            name: type(SLIDERS[name][3])(value) for name, value in zip(SLIDERS, values, strict=True)
        }
        pieces: Any = self.generator.stream(instruction, input, **chosen)
        try:
            with closing(pieces):  # a reader who stops, or goes away, stops the model
                for piece in pieces:
                    shown += piece
                    yield shown if stream else gr.skip()
                    if request.session_hash in self.stopped:
                        break
        except LoraAlpacaError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        yield shown

    def stop(self, request: gr.Request) -> None:
        """End the answer of this session. Gradio's own `cancels` would end it too, but often shows an error there."""
        self.stopped.add(request.session_hash)


def _slider(name: str, value: float) -> gr.Slider:
    """Return the control of a sampling option; its range includes the value of the command line."""
    label, lowest, highest, step, info = SLIDERS[name]
    low, high = min(lowest, value), max(highest, value)
    return gr.Slider(low, high, value, step=step, label=label, info=info, min_width=280)


def _described(generator: Generator, config: GenerateConfig) -> str:
    """Return a line on what answers here. Of a folder only its name is shown, for the page may be public."""
    model = generator.model
    base = model.config.name_or_path
    names = [DEMO if base == str(demo_base()) else base]
    if hasattr(model, "peft_config"):
        names.append(config.lora_weights or ADAPTER_DIR)
    shown = [Path(name).resolve().name if user_path(name).exists() else name for name in names]
    return f"Model: {', adapter: '.join(shown)}. What it says may be wrong."


def _address(host: str, port: int | None) -> tuple[int, bool]:
    """Return the port to listen on, the next free one if none is asked for, and whether it is this machine's alone."""
    try:
        family, *_, (address, *_) = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"--server_name {host}: no such host; 127.0.0.1 is this machine") from None
    for candidate in PORTS if port is None else [port]:
        try:
            socket.create_server((str(address), candidate), family=family).close()
            return candidate, ipaddress.ip_address(address).is_loopback
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"--server_name {host}: not an address of this machine") from None
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"--server_port {candidate}: {error.strerror}") from None
    asked = f"{PORTS[0]} to {PORTS[-1]} are" if port is None else f"{port} is"
    raise ConfigError(f"--server_port: {asked} in use; name another one, or leave the flag out for the next free one")
