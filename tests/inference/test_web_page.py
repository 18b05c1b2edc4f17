"""The web page without a browser: what its controls hand on, what it shows, and how it is served."""

import asyncio
import html
import importlib
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

gr = pytest.importorskip("gradio")

from lora_alpaca.config import GenerateConfig  # noqa: E402
from lora_alpaca.errors import ConfigError  # noqa: E402
from lora_alpaca.inference import web_page  # noqa: E402
from lora_alpaca.models.base import demo_base  # noqa: E402

SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "num_beams": 2, "max_new_tokens": 33}


@pytest.fixture(autouse=True)
def closed_loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the event loops that gradio makes for every page and leaves open."""
    made: list[asyncio.AbstractEventLoop] = []
    make = asyncio.new_event_loop

    def remember() -> asyncio.AbstractEventLoop:
        made.append(make())
        return made[-1]

    monkeypatch.setattr(asyncio, "new_event_loop", remember)
    yield
    asyncio.set_event_loop(None)
    for loop in made:
        loop.close()


class FakeGenerator:
    """Streams `pieces`, an exception among them being raised, and remembers what it was asked."""

    def __init__(self, *pieces: str | Exception):
        self.model = SimpleNamespace(config=SimpleNamespace(name_or_path="tiny"))
        self.pieces = pieces
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.open = 0

    def stream(self, instruction: str, input: str = "", **changes: Any) -> Iterator[str]:
        self.asked.append((instruction, input, changes))
        self.open += 1
        try:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.open -= 1


def build(generator: Any, **options: Any) -> Any:
    return web_page.build(generator, GenerateConfig(**options))


def function(page: Any, name: str) -> Any:
    """Return the function behind a button of the page."""
    return next(event.fn for event in page.fns.values() if event.fn.__name__ == name)


def answer(page: Any, stream: bool = True, session: str = "one", **sampling: Any) -> Any:
    """Press submit; return the iterator over what the output box is told."""
    values = (SAMPLING | sampling).values()
    return function(page, "answer")("Say it.", "loud", stream, gr.Request(session_hash=session), *values)


def components(page: Any) -> dict[str, Any]:
    """Return the components of a page by their labels."""
    return {block.label: block for block in page.blocks.values() if getattr(block, "label", None)}


# -------------------------------------------------------------------------------------------------------- controls


def test_every_control_is_handed_on_exactly() -> None:
    generator = FakeGenerator("yes")
    list(answer(build(generator)))
    assert generator.asked == [("Say it.", "loud", SAMPLING)]


def test_numbers_arrive_in_their_types() -> None:
    """A browser sends 1.0 as 1, and transformers refuses a whole temperature."""
    generator = FakeGenerator("yes")
    list(answer(build(generator), temperature=1, top_p=1, top_k=40.0))
    changes = generator.asked[0][2]
    assert [type(value) for value in changes.values()] == [float, float, int, int, int]


def test_event_takes_the_controls_in_their_order() -> None:
    page = build(FakeGenerator())
    event = next(event for event in page.fns.values() if event.fn.__name__ == "answer")
    labels = ["Instruction", "Input", "Stream output", "Temperature", "Top p", "Top k", "Beams", "Max tokens"]
    assert [block.label for block in event.inputs] == labels
    assert [block.label for block in event.outputs] == ["Output"]
    assert set(SAMPLING) == set(web_page.SLIDERS)


def test_controls_start_at_the_config() -> None:
    shown = components(build(FakeGenerator(), **SAMPLING))
    assert [shown[label].value for label, *_ in web_page.SLIDERS.values()] == list(SAMPLING.values())
    assert shown["Stream output"].value is True


def test_ranges_hold_what_the_command_line_said() -> None:
    shown = components(build(FakeGenerator(), temperature=7.5, top_p=0.001, top_k=500, max_new_tokens=9000))
    assert shown["Temperature"].maximum == 7.5
    assert shown["Top p"].minimum == 0.001
    assert shown["Top k"].maximum == 500
    assert shown["Max tokens"].maximum == 9000
    assert "one piece" in shown["Beams"].info


# ---------------------------------------------------------------------------------------------------------- answers


def test_stream_shows_every_piece() -> None:
    assert list(answer(build(FakeGenerator("Alpacas ", "", "hum.")))) == ["", *["Alpacas "] * 2, *["Alpacas hum."] * 2]


def test_without_stream_the_whole_answer_comes_at_once() -> None:
    first, *between, last = answer(build(FakeGenerator("Alpacas ", "hum.")), stream=False)
    assert first == ""
    assert between == [gr.skip()] * 2
    assert last == "Alpacas hum."


def test_an_error_of_ours_is_shown_as_text_and_the_next_answer_comes() -> None:
    generator = FakeGenerator(ConfigError("the prompt <b>does not</b> fit"))
    page = build(generator)
    with pytest.raises(gr.Error) as raised:
        list(answer(page))
    assert raised.value.message == html.escape("the prompt <b>does not</b> fit")  # gradio shows messages as HTML
    assert not raised.value.print_exception
    generator.pieces = ("better",)
    assert list(answer(page))[-1] == "better"


def test_stop_ends_the_answer_of_its_session_only() -> None:
    generator = FakeGenerator("a", "b", "c")
    page = build(generator)
    mine, other = answer(page, session="mine"), answer(page, session="other")
    assert [next(mine), next(mine), next(other), next(other)] == ["", "a", "", "a"]
    function(page, "stop")(gr.Request(session_hash="mine"))
    assert list(mine) == ["a"]
    assert generator.open == 1
    assert list(other)[-1] == "abc"


def test_stop_does_not_outlast_its_answer() -> None:
    page = build(FakeGenerator("a", "b"))
    function(page, "stop")(gr.Request(session_hash="one"))
    assert list(answer(page))[-1] == "ab"


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_who_leaves_stops_the_model(stream: bool) -> None:
    generator = FakeGenerator("a", "b")
    running = answer(build(generator), stream)
    next(running), next(running)
    assert generator.open == 1
    running.close()
    assert generator.open == 0


# -------------------------------------------------------------------------------------------------------- the page


def test_output_is_text_and_names_are_escaped() -> None:
    generator = FakeGenerator()
    generator.model.config.name_or_path = "<i>base</i>"
    page = build(generator)
    output = components(page)["Output"]
    assert type(output) is gr.Textbox
    assert output.interactive is False
    (head,) = [block.value for block in page.blocks.values() if isinstance(block, gr.HTML)]
    assert "Model: &lt;i&gt;base&lt;/i&gt;. What it says may be wrong." in head
    assert not any(isinstance(block, gr.Markdown) for block in page.blocks.values())


def test_head_names_what_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def described(**options: Any) -> str:
        return web_page._described(generator, GenerateConfig(**options)).removesuffix(". What it says may be wrong.")

    monkeypatch.chdir(tmp_path)
    generator: Any = FakeGenerator()
    generator.model.config.name_or_path = str(demo_base())
    assert described() == described(lora_weights="none") == "Model: demo"
    generator.model.peft_config = {}  # as PEFT's models have
    assert described(lora_weights="someone/adapter") == "Model: demo, adapter: someone/adapter"
    Path("lora-alpaca").mkdir()
    assert described() == "Model: demo, adapter: lora-alpaca"
    generator.model.config.name_or_path = str(tmp_path)
    assert described() == f"Model: {tmp_path.name}, adapter: lora-alpaca"


def test_analytics_are_off_and_fonts_are_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    importlib.reload(web_page)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert build(FakeGenerator()).analytics_enabled is False
    assert web_page.THEME.font == "system-ui, sans-serif"
    assert web_page.THEME.font_mono == "ui-monospace, monospace"


# ---------------------------------------------------------------------------------------------------------- serving


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make `launch` return instead of serving; the dict gets what gradio was told."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: told.update(options, page=page))
    monkeypatch.setattr(gr.Blocks, "close", lambda page, **options: told.update(closed=True))
    monkeypatch.setattr(web_page, "Event", lambda: SimpleNamespace(wait=lambda: None))
    monkeypatch.setenv("no_proxy", "intranet")
    return told


def launch(**options: Any) -> None:
    generator: Any = FakeGenerator("yes")
    web_page.launch(generator, GenerateConfig(**options))


def test_launch_is_private_by_default(
    launched: dict[str, Any], free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(server_port=free_port)
    assert launched["server_name"] == "127.0.0.1"
    assert launched["server_port"] == free_port
    assert launched["share"] is False
    assert launched["allowed_paths"] == launched["footer_links"] == []
    assert launched["closed"]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"server_name": "0.0.0.0"}, {"share_gradio": True}])
def test_launch_honours_its_flags_and_warns_of_an_open_page(
    launched: dict[str, Any], free_port: int, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    launch(server_port=free_port, **options)
    assert launched["server_name"] == options.get("server_name", "127.0.0.1")
    assert launched["share"] is options.get("share_gradio", False)
    assert "warning: the page has no password" in capsys.readouterr().err


def test_own_page_is_not_asked_for_through_a_proxy(launched: dict[str, Any], free_port: int) -> None:
    launch(server_port=free_port)
    assert os.environ["no_proxy"] == "intranet,localhost,127.0.0.1"


def test_port_in_use_is_one_line_and_the_next_one_is_found(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        with pytest.raises(ConfigError, match=f"--server_port: {free_port} is in use; name another one"):
            launch(server_port=free_port)
        monkeypatch.setattr(web_page, "PORTS", range(free_port, free_port + 20))
        assert web_page._address("127.0.0.1", None)[0] > free_port
        monkeypatch.setattr(web_page, "PORTS", range(free_port, free_port + 1))
        with pytest.raises(ConfigError, match=f"{free_port} to {free_port} are in use"):
            launch()


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("300.1.1.1", "no such host"),
        ("", "no such host"),
        ("a" * 100, "no such host"),
    ],
)
def test_invalid_host_is_one_line(host: str, message: str, free_port: int) -> None:
    with pytest.raises(ConfigError, match=message):
        launch(server_name=host, server_port=free_port)


def test_address_of_another_machine_is_one_line(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = "192.0.2.1"  # reserved for documentation, so nobody's
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (elsewhere, 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **more: [found])
    with pytest.raises(ConfigError, match=f"--server_name {elsewhere}: not an address of this machine"):
        launch(server_name=elsewhere, server_port=free_port)


def test_a_failure_of_the_server_is_one_line(
    launched: dict[str, Any], free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(page: Any, **options: Any) -> None:
        raise OSError("taken in the meantime")

    monkeypatch.setattr(gr.Blocks, "launch", fail)
    with pytest.raises(ConfigError, match=f"--server_port {free_port}: taken in the meantime"):
        launch(server_port=free_port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_page_is_served_and_closed(host: str, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real server, asked at the place where `launch` waits to be interrupted."""
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    got: dict[str, str] = {}
    url = f"http://{f'[{host}]' if ':' in host else host}:{free_port}/"

    def interrupted() -> None:
        for path in ("", "theme.css"):
            with urllib.request.urlopen(url + path) as response:
                got[path] = response.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="40"):
            urllib.request.urlopen(url + "monitoring/summary")
        raise KeyboardInterrupt

    monkeypatch.setattr(web_page, "Event", lambda: SimpleNamespace(wait=interrupted))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(KeyboardInterrupt):
        launch(server_name=host, server_port=free_port)
    assert "LoRA Alpaca" in got[""]
    assert "fonts.googleapis" not in got[""] + got["theme.css"]
    assert "url(http" not in got["theme.css"].replace("'", "").replace('"', "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, free_port), 5).close()
