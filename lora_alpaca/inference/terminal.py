"""Answers in the terminal: one, a chat, or the web page that is opened from there."""

import importlib.util
import sys
from typing import Any

from lora_alpaca.config import GenerateConfig
from lora_alpaca.errors import ConfigError


def generate(config: GenerateConfig) -> None:
    """Answer once, chat in the terminal, or open the web page."""
    page = config.instruction is None and not config.chat
    if page and importlib.util.find_spec("gradio") is None:
        raise ConfigError('the web page needs gradio (pip install "lora-alpaca[web]"); or say --instruction or --chat')
    from lora_alpaca.inference.generator import Generator

    generator = Generator.load(config)
    if config.instruction is not None:
        _print_stream(generator.stream(config.instruction, config.input))
    elif config.chat:
        print("One instruction a line; an empty line leaves.", file=sys.stderr)
        history: list[tuple[str, str]] = []  # of templates that take several turns
        while line := _read_line():
            answer = _print_stream(generator.stream(line, history=history))
            if generator.takes_turns:
                history.append((line, answer))
    else:
        from lora_alpaca.inference.web_page import launch

        launch(generator, config)


def _print_stream(pieces: Any) -> str:
    """Print an answer as it is made, and return it."""
    answer = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        answer += piece
    print()
    return answer


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
