"""The web page served: its address, what its server is told, and what it refuses."""

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

import scripted_page  # noqa: E402
from scripted_page import Scripted, demo_tokenizer, generator_of  # noqa: E402

from lora_alpaca.config import GenerateConfig  # noqa: E402
from lora_alpaca.errors import ConfigError  # noqa: E402
from lora_alpaca.inference.addresses import listen  # noqa: E402
from lora_alpaca.inference.page import launch as launching  # noqa: E402


@pytest.fixture(autouse=True)
def closed_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with scripted_page.closed_and_quick(monkeypatch):
        yield


# ---------------------------------------------------------------------------------------------------------- serving


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make `launch` return instead of serving; the dict gets what gradio was told."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **options: told.update(options, page=page))
    monkeypatch.setattr(gr.Blocks, "close", lambda page, **options: told.update(closed=True))
    monkeypatch.setattr(launching, "Event", lambda: SimpleNamespace(wait=lambda: None))
    monkeypatch.setenv("no_proxy", "intranet")
    return told


def launch(**options: Any) -> None:
    generator = generator_of(Scripted(demo_tokenizer()))
    launching.launch(generator, GenerateConfig(**options))


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
        opened = listen("127.0.0.1", None, range(free_port, free_port + 20))
        opened.socket.close()
        assert opened.port > free_port
        monkeypatch.setattr(launching, "PORTS", range(free_port, free_port + 1))
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

    monkeypatch.setattr(launching, "Event", lambda: SimpleNamespace(wait=interrupted))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(KeyboardInterrupt):
        launch(server_name=host, server_port=free_port)
    assert "LoRA Alpaca" in got[""]
    assert "fonts.googleapis" not in got[""] + got["theme.css"]
    assert "url(http" not in got["theme.css"].replace("'", "").replace('"', "")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, free_port), 5).close()


# -------------------------------------------------------------------------------------------- what is refused to serve


@pytest.fixture
def asked(free_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return `asked(lines, server_name, share_url)`: what a real server answers to raw requests, one after another."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def ask(requests: list[str], server_name: str = "127.0.0.1", share_url: str = "") -> list[str]:
        answers: list[str] = []

        def interrupted() -> None:
            for request in requests:
                with socket.create_connection(("127.0.0.1", free_port), 10) as connection:
                    connection.sendall(request.replace("PORT", str(free_port)).encode())
                    answers.append(b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode("latin-1"))
            raise KeyboardInterrupt

        if share_url:
            launch_page = gr.Blocks.launch

            def launched(page: Any, **options: Any) -> None:
                launch_page(page, **options | {"share": False})
                page.share_url = share_url

            monkeypatch.setattr(gr.Blocks, "launch", launched)
        monkeypatch.setattr(launching, "Event", lambda: SimpleNamespace(wait=interrupted))
        with pytest.raises(KeyboardInterrupt):
            launch(server_name=server_name, server_port=free_port, share_gradio=bool(share_url))
        return answers

    return ask


def get(host: str, path: str = "/config", more: str = "") -> str:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n"


def status(answer: str) -> int:
    return int(answer.split(" ", 2)[1])


def test_the_page_answers_under_its_own_names_only(asked: Any) -> None:
    own = ["127.0.0.1:PORT", "localhost:PORT", "LOCALHOST", "[::1]:PORT", "localhost."]
    foreign = ["evil.example:PORT", "127.0.0.1.evil.example", "localhost.evil.example", "", "10.0.0.1:PORT", "a@b:x"]
    twice = "GET /config HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    none = "GET /config HTTP/1.0\r\n\r\n"
    answers = asked([*map(get, own), *map(get, foreign), twice, none])
    assert [status(answer) for answer in answers] == [200] * len(own) + [400] * (len(foreign) + 2)
    assert "--server_name says under which (now 127.0.0.1)" in answers[len(own)]


def test_the_browser_is_told_to_fetch_nothing_from_elsewhere(asked: Any) -> None:
    for answer in asked([get("localhost", path) for path in ("/", "/config", "/theme.css")]):
        head = answer.partition("\r\n\r\n")[0].lower()
        policy = head.partition("content-security-policy: ")[2].partition("\r\n")[0]
        assert policy.startswith("default-src 'self' ") and "http" not in policy and "*" not in policy
        assert "referrer-policy: no-referrer" in head and "x-content-type-options: nosniff" in head


def test_a_page_on_every_address_answers_under_numbers_and_the_machines_name(asked: Any) -> None:
    hosts = ["127.0.0.1:PORT", "10.1.2.3:PORT", socket.gethostname(), "evil.example:PORT"]
    assert [status(answer) for answer in asked([*map(get, hosts)], "0.0.0.0")] == [200, 200, 200, 400]


def test_a_shared_page_answers_under_its_link(asked: Any) -> None:
    hosts = ["abc.gradio.live", "xyz.gradio.live", "localhost:PORT"]
    assert [status(answer) for answer in asked([*map(get, hosts)], share_url="https://abc.gradio.live")] == [
        200,
        400,
        200,
    ]


def test_a_page_from_elsewhere_may_not_use_this_one(asked: Any) -> None:
    body = '{"data": [], "fn_index": 0, "session_hash": "x"}'
    post = "POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: "
    post += f"application/json\r\nContent-Length: {len(body)}\r\nOrigin: ORIGIN\r\n\r\n{body}"
    origins = ["https://evil.example", "null", "http://localhost:PORT"]
    answers = asked([post.replace("ORIGIN", origin) for origin in origins])
    assert [status(answer) for answer in answers[:2]] == [403, 403]
    assert status(answers[2]) not in (400, 403, 404, 405)


def test_the_page_takes_and_gives_no_files(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    form = '--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nx\r\n--b--\r\n'
    upload = (
        "POST PATH HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: multipart/form-data; boundary=b"
    )
    upload += f"\r\nContent-Length: {len(form)}\r\n\r\n{form}"
    paths = ["/gradio_api/upload", "/gradio_api/upload?upload_id=1", "/upload", "/gradio_api/component_server"]
    paths += ["/gradio_api/process_recording", "/gradio_api/stream/1", "/gradio_api/UPLOAD", "/gradio_api/%75pload"]
    reads = [f"/gradio_api/file={tmp_path}/secret.txt", f"/gradio_api/file/{tmp_path}/secret.txt", "/monitoring"]
    reads += ["/gradio_api/proxy=http://localhost/", "/gradio_api/upload_progress?upload_id=1", "/gradio_api/deep_link"]
    before = sorted(tmp_path.rglob("*"))
    answers = asked([*(upload.replace("PATH", path) for path in paths), *(get("localhost", path) for path in reads)])
    assert [status(answer) for answer in answers] == [405] * len(paths) + [404] * len(reads)
    assert not any("secret" in answer for answer in answers)
    assert sorted(tmp_path.rglob("*")) == before  # the folder for temporary files
