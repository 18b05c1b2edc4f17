"""What the server refuses, and who waits: names, keys, sizes, the queue, clients that leave, answers that fail."""

import contextlib
import json
import re
import socket
import threading
import time
from urllib.parse import quote

import openai
import pytest
from running_server import Metronome, error_of, scripted, serving

from lora_alpaca import GenerateConfig
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference.addresses import listen
from lora_alpaca.inference.sampling import Token
from lora_alpaca.inference.server import guard, json_bodies, listening
from lora_alpaca.inference.server.serving import read_key
from lora_alpaca.inference.server.serving import serve as serve_command

pytest_plugins = ["server_fixtures"]

ASK = {"messages": [{"role": "user", "content": "Where does the owl live?"}], "temperature": 0, "max_tokens": 4}
KEY = "sk-alpaca-123"


@pytest.fixture
def metronome(generator):
    """Return `metronome(**options)`: a context with a server, and a token generator that makes a token a tick."""

    @contextlib.contextmanager
    def make(**options):
        tokens = Metronome(generator.codecs[generator.default].text_ids("owl")[-1])
        with serving(None, **options) as running:
            running.service.use(scripted(generator, tokens))
            try:
                yield running, tokens
            finally:
                tokens.close()

    return make


def raw(url, text, seconds=10):
    """Return what a server answers to bytes, until it closes the connection or says no more for a while."""
    host, port = url.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(text if isinstance(text, bytes) else text.encode())
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := connection.recv(65536):
                found += part
                head, _, body = found.partition(b"\r\n\r\n")
                if head == b"HTTP/1.1 100 Continue":
                    head, _, body = body.partition(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head)
                if length and len(body) >= int(length[1]):
                    break
    return found.decode()


def post(url, body, *headers, path="/v1/chat/completions"):
    """Return the answer to bytes that are posted."""
    body = body if isinstance(body, bytes) else body.encode()
    host = url.removeprefix("http://")
    head = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", *headers]
    return raw(url, "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)


def until(true, seconds=5.0):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "[::bad", ""])
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics"])
def test_a_foreign_name_is_refused(server, host, path):
    """A page from elsewhere whose name is made to point here (DNS rebinding) cannot use the server."""
    found = raw(server.url, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")
    assert found.startswith("HTTP/1.1 400")
    assert "own" not in json.loads(found.partition("\r\n\r\n")[2])["error"]["type"]


def test_two_names_are_refused(server):
    host = server.url.removeprefix("http://")
    assert raw(server.url, f"GET /health HTTP/1.1\r\nHost: {host}\r\nHost: evil.example\r\n\r\n").startswith(
        "HTTP/1.1 400"
    )


def test_own_names_are_served(server):
    port = server.url.rpartition(":")[2]
    for name in ("localhost", "127.0.0.1", "[::1]", f"localhost:{port}", "LOCALHOST"):
        assert raw(server.url, f"GET /health HTTP/1.1\r\nHost: {name}\r\n\r\n").startswith("HTTP/1.1 200")


def test_pages_from_elsewhere_are_refused(server):
    assert "Origin" in error_of(server.http.get("/v1/models", headers={"Origin": "https://evil.example"}), 403)["param"]
    error_of(server.http.get("/v1/models", headers={"Origin": "null"}), 403)
    found = server.http.get("/v1/models", headers={"Origin": server.url})
    assert found.status_code == 200
    assert not any(name.startswith("access-control") for name in found.headers)
    error_of(server.http.options("/v1/chat/completions", headers={"Origin": server.url}), 405)


TRAVERSALS = [
    prefix + step
    for prefix in ("/", "/v1/", "/v1/models/", "/health/", "/metrics/")
    for step in (
        "../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "....//....//etc/passwd",
        "..\\..\\..\\etc\\passwd", "%00/etc/passwd",
    )
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_a_path_leads_to_no_file(server, path):
    host = server.url.removeprefix("http://")
    found = raw(server.url, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n")
    assert found.startswith("HTTP/1.1 404"), found
    assert "root:" not in found
    assert json.loads(found.partition("\r\n\r\n")[2])["error"]["type"] == "not_found_error"


SCRIPTS = [
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "javascript:alert(1)", "<svg/onload=alert(1)>",
    "{{7*7}}", "${jndi:ldap://x}", "'; DROP TABLE models; --", "\x1b]0;owned\x07", "\r\nSet-Cookie: a=b", "../<b>",
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stays_text(server, script, capfd):
    """Wherever it is said, it comes back as JSON that no browser takes for a page, and as text in the log."""
    asked = [
        server.post(**ASK | {"model": script}),
        server.post(**ASK | {script: 1}),
        server.post(**ASK | {"messages": [{"role": script, "content": "a"}]}),
        server.http.get(f"/v1/models/{quote(script)}"),
        server.http.get(f"/{quote(script)}"),
    ]
    for found in asked:
        assert found.headers["content-type"] == "application/json"
        assert found.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in found.headers
        assert found.status_code < 500
        assert "49" not in found.json().get("error", {}).get("message", "")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(asked)
    assert not any("\x1b" in line or "\x07" in line for line in lines)


# ------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_asked_for(serve):
    with serve(key=KEY) as running:
        assert running.ask().choices
        for key in ("wrong", KEY + "x", KEY[:-1], KEY.upper(), "none"):
            with pytest.raises(openai.AuthenticationError) as error:
                openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0).models.list()
            assert error.value.code == "invalid_api_key"
            assert KEY not in error.value.message
        for header in ("", "Basic abc", KEY, f"Bearer{KEY}", "Bearer", f"Bearer {KEY} {KEY}"):
            found = running.http.get("/v1/models", headers={"Authorization": header})
            error_of(found, 401)
            assert found.headers["www-authenticate"].startswith("Bearer")
        error_of(running.http.get("/metrics"), 401)
        error_of(running.http.get("/nothing"), 401)
        assert running.http.get("/health").status_code == 200
        assert running.http.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_the_key_is_not_compared_letter_by_letter(monkeypatch, serve):
    compared = []
    original = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda *pair: compared.append(pair) or original(*pair))
    with serve(key=KEY) as running:
        running.http.get("/v1/models", headers={"Authorization": "Bearer a"})
    [(one, other)] = compared
    assert len(one) == len(other) == 32
    assert KEY.encode() not in (one, other)


def test_where_the_key_is_found(tmp_path, monkeypatch):
    assert read_key("") == ""
    monkeypatch.setenv("LORA_ALPACA_API_KEY", "from-the-environment")
    assert read_key("") == "from-the-environment"
    file = tmp_path / "key"
    file.write_text(f"  {KEY}\nsecond line\n")
    assert read_key(str(file)) == KEY
    for content, words in {"": "is empty", "\nlater": "is empty", "two words": "ASCII", "clé": "ASCII"}.items():
        file.write_text(content)
        with pytest.raises(ConfigError, match=words):
            read_key(str(file))
    with pytest.raises(ConfigError, match=r"--api_key_file .*none: No such file"):
        read_key(str(tmp_path / "none"))


def test_the_network_needs_a_key(monkeypatch):
    monkeypatch.delenv("LORA_ALPACA_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"--server_name 0\.0\.0\.0: on a network the API needs a key"):
        serve_command(GenerateConfig(serve=True, base_model="none", server_name="0.0.0.0"))


def test_an_address_is_checked_before_the_model_is_loaded(free_port):
    taken = socket.create_server(("127.0.0.1", free_port))
    with taken, pytest.raises(ConfigError, match=f"--server_port: {free_port} is in use"):
        serve_command(GenerateConfig(serve=True, base_model="none", server_port=free_port))
    with pytest.raises(ConfigError, match=r"--server_name no\.such: no such host"):
        serve_command(GenerateConfig(serve=True, base_model="none", server_name="no.such"))


def test_it_listens_on_this_machine_alone():
    assert GenerateConfig(serve=True).server_name == "127.0.0.1"
    opened = listen("127.0.0.1", 0, ())
    with opened.socket:
        assert opened.is_private and opened.socket.getsockname()[0] == "127.0.0.1"


# ------------------------------------------------------------------------------------------------------------ sizes


def test_a_body_has_a_limit(server, monkeypatch):
    assert post(server.url, "{}", "Expect: 100-continue").startswith("HTTP/1.1 100")
    found = raw(server.url, f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {100 * 2**20}\r\nExpect: 100-continue\r\n\r\n")  # fmt: skip
    assert found.startswith("HTTP/1.1 413")
    monkeypatch.setattr(json_bodies, "LARGEST_BODY", 1000)
    error_of(server.post(**ASK | {"user": "x" * 1000}), 413)
    chunks = "".join(f"64\r\n{'x' * 100}\r\n" for _ in range(20)) + "0\r\n\r\n"
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    found = raw(server.url, f"{head}Transfer-Encoding: chunked\r\n\r\n{chunks}")
    assert found.startswith("HTTP/1.1 413")
    assert server.post(**ASK).status_code == 200


def test_a_slow_body_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(json_bodies, "SLOWEST_BODY", 0.2)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert raw(server.url, f"{head}Content-Length: 100\r\n\r\n{{").startswith("HTTP/1.1 408")


def test_a_slow_head_is_not_waited_for(serve, monkeypatch):
    monkeypatch.setattr(listening, "SLOWEST_HEADERS", 0.3)
    with serve() as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            since = time.monotonic()
            with contextlib.suppress(OSError):  # it drips for ever
                for letter in "GET /health HTTP/1.1\r\nX: " + "x" * 100:
                    connection.sendall(letter.encode())
                    time.sleep(0.02)
            assert time.monotonic() - since < 2
            assert connection.recv(10) == b""


def test_a_client_that_reads_nothing_is_left(generator, monkeypatch, metronome):
    monkeypatch.setattr(guard, "SLOWEST_READER", 0.5)
    with metronome() as (running, tokens):
        tokens.run(0.0005)
        host, port = running.url.removeprefix("http://").split(":")
        body = json.dumps(ASK | {"stream": True, "max_tokens": 400, "n": 8, "stop": ["\0"]})
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect((host, int(port)))
            connection.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            until(lambda: len(tokens.channels) == 8)
            until(lambda: running.service.admission.taken == 0, seconds=20)
            assert all(channel.left.is_set() for channel in tokens.channels)


def test_connections_have_a_limit(generator):
    with serving(generator) as running, contextlib.ExitStack() as opened:
        host, port = running.url.removeprefix("http://").split(":")
        flood = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(420)]
        until(lambda: len(running.listening._server.server_state.connections) >= 400)
        flood[-1].settimeout(10)
        last = b"".join(iter(lambda: flood[-1].recv(4096), b"")).decode()
        assert last.startswith("HTTP/1.1 503")
        assert json.loads(last.partition("\r\n\r\n")[2])["error"]["message"] == "there are too many connections"
        opened.close()
        until(lambda: len(running.listening._server.server_state.connections) == 0)
        assert running.post(**ASK).status_code == 200


# ------------------------------------------------------------------------------------------------------- the queue


def test_a_full_queue_is_told(metronome):
    with metronome(max_batch=1, max_waiting=2) as (running, tokens):
        waiting = [threading.Thread(target=running.post, kwargs=ASK | {"max_tokens": 2}) for _ in range(3)]
        for thread in waiting:
            thread.start()
        until(lambda: len(tokens.channels) == 3)
        found = running.post(**ASK)
        assert error_of(found, 429)["code"] == "queue_full"
        assert int(found.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            running.ask()
        error_of(running.post(**ASK | {"n": 4}), 400)
        assert running.http.get("/health").status_code == 200
        for _ in range(2):
            tokens.tick()
        for thread in waiting:
            thread.join(5)
        until(lambda: running.service.admission.taken == 0)
        assert 'status="429"} 2.0' in running.http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_free_their_places(metronome, stream):
    """100 of them, each within one token of leaving."""
    with metronome(max_batch=8, max_waiting=92) as (running, tokens):
        body = json.dumps(ASK | {"stream": stream, "max_tokens": 400})
        request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
        host, port = running.url.removeprefix("http://").split(":")
        clients = [socket.create_connection((host, int(port)), timeout=10) for _ in range(100)]
        for client in clients:
            client.sendall(request)
        until(lambda: len(tokens.channels) == 100, seconds=20)
        error_of(running.post(**ASK), 429)
        tokens.tick()
        if stream:
            for client in clients:
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
        for client in clients:
            client.close()
        until(lambda: running.service.admission.taken == 0)
        made = list(tokens.made)
        tokens.tick()
        assert tokens.made == made == [1] * 100
        assert "lora_alpaca_clients_left_total 100.0" in running.http.get("/metrics").text


def test_after_clients_that_left_the_model_answers(server):
    body = json.dumps(ASK | {"stream": True, "max_tokens": 400, "logit_bias": {"2": -100}})
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(20):
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            client.recv(1000)
    since = time.monotonic()
    assert server.post(**ASK).status_code == 200
    assert time.monotonic() - since < 3
    until(lambda: server.service.admission.taken == 0)


# ---------------------------------------------------------------------------------------------- answers that fail


@pytest.mark.parametrize("stream", [False, True])
def test_an_exception_fails_one_request_alone(metronome, stream, capfd):
    with metronome(max_batch=4) as (running, tokens):
        results = {}

        def ask(name):
            results[name] = running.http.post("/v1/chat/completions", json=ASK | {"stream": stream})

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("good", "bad")]
        for number, thread in enumerate(threads, start=1):
            thread.start()
            until(lambda number=number: len(tokens.channels) == number)
        tokens.tick()
        tokens.channels[1].end(RuntimeError("it broke: \x1b[31m"))
        tokens.channels[1].left.set()
        for _ in range(3):
            tokens.tick()
        for thread in threads:
            thread.join(10)
        assert results["good"].status_code == 200
        if stream:
            assert results["good"].text.endswith("data: [DONE]\n\n")
            events = [line for line in results["bad"].text.splitlines() if line]
            assert results["bad"].status_code == 200
            assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "model_failed"
            assert "[DONE]" not in results["bad"].text
        else:
            assert error_of(results["bad"], 500)["type"] == "server_error"
            assert "it broke" not in results["bad"].text
        until(lambda: running.service.admission.taken == 0)
        said = capfd.readouterr().err
        assert "RuntimeError: it broke" in said and "\x1b" not in said


def test_a_model_that_fails_is_not_well(metronome, generator):
    """After an answer that failed, the model is asked for one token; if that fails too, all are told."""
    with metronome() as (running, tokens):
        assert running.http.get("/health").json() == {"status": "ok"}
        thread = threading.Thread(target=running.post, kwargs=ASK)
        thread.start()
        until(lambda: len(tokens.channels) == 1)
        tokens.channels[0].end(RuntimeError("first"))
        until(lambda: len(tokens.channels) == 2)  # the probe
        tokens.channels[1].put([Token(5, float("nan"))])
        tokens.channels[1].end()
        until(lambda: running.http.get("/health").status_code == 503)
        thread.join(5)
        error = error_of(running.post(**ASK), 503)
        assert error["message"] == "the model fails"


def test_nothing_is_answered_before_the_model_is_loaded(generator):
    with serving(None) as running:
        found = running.http.get("/health")
        assert found.status_code == 503 and found.json() == {"status": "the model is being loaded"}
        error_of(running.http.get("/v1/models"), 503)
        error_of(running.post(**ASK), 503)
        running.service.open(generator)
        assert running.post(**ASK).status_code == 200


def test_a_log_has_a_line_for_each_request_and_nothing_of_what_was_asked(server, capfd):
    server.post(**ASK | {"messages": [{"role": "user", "content": "a secret question"}]})
    server.http.get("/v1/%0a%1b[31mforged")
    one, other = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r'127\.0\.0\.1 "POST /v1/chat/completions" 200 \d+\.\d{3}s prompt_tokens=\d+ completion_tokens=\d+', one
    )
    assert "secret" not in one
    assert other.startswith('127.0.0.1 "GET /v1/%0') and " 404 " in other
