"""What generate.py does: one answer, those to a file, a chat in the terminal, the API, or the web page."""

from contextlib import closing
from importlib.util import find_spec

from lora_alpaca.config import GenerateConfig
from lora_alpaca.config.importing import importing
from lora_alpaca.errors import ConfigError

PAGE, SERVER = ("gradio",), ("fastapi", "uvicorn", "llguidance", "prometheus_client")


def generate(config: GenerateConfig) -> None:
    """Do what a config asks for. What it prints on standard output is answers alone."""
    if config.data_path:
        from lora_alpaca.inference.file_answers import answer_file

        return answer_file(config)
    if config.serve:
        _require(SERVER, "--serve", "serve")
        from lora_alpaca.inference.server.serving import serve

        return serve(config)
    if config.instruction is None and not config.chat:
        _require(PAGE, "the web page", "web", "; or say --instruction or --chat")
    with importing():
        from lora_alpaca.inference.generator import Generator

    with closing(Generator.load(config)) as generator:
        if config.instruction is not None:
            from lora_alpaca.inference.chat import print_answer, tell_limit

            answer = generator.stream(config.instruction, config.input)
            print_answer(answer)
            tell_limit(answer)
        elif config.chat:
            from lora_alpaca.inference.chat import Chat

            Chat(generator).run()
        else:
            from lora_alpaca.inference.page.launch import launch

            launch(generator, config)


def _require(libraries: tuple[str, ...], what: str, extra: str, otherwise: str = "") -> None:
    """Raise ConfigError where a library is not installed that something needs."""
    for library in libraries:
        if find_spec(library) is None:
            raise ConfigError(f'{what} needs {library} (pip install "lora-alpaca[{extra}]"){otherwise}')
