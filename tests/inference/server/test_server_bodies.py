"""Bodies that are no request: hundreds of them, each refused in OpenAI's form, and none of them the server's end."""

import json
import random

import pytest
from running_server import error_of

pytest_plugins = ["server_fixtures"]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
VALID = {
    CHAT: {"messages": [{"role": "user", "content": "Where does the owl live?"}], "max_tokens": 2, "temperature": 0},
    COMPLETIONS: {"prompt": "Where does the owl live?", "max_tokens": 2, "temperature": 0},
}
JSON = {"Content-Type": "application/json"}

NO_JSON = {
    "nothing": b"",
    "white space": b"  \n",
    "a byte": b"\xff",
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "broken UTF-8": b'{"prompt": "\xe2\x82"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "a list": b"[]",
    "a number": b"1",
    "a text": b'"a"',
    "null": b"null",
    "cut short": b'{"prompt": "a"',
    "two objects": b"{}{}",
    "a comma too many": b'{"prompt": "a",}',
    "single quotes": b"{'prompt': 'a'}",
    "a comment": b'{"prompt": "a"} // b',
    "no quotes": b"{prompt: 1}",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": Infinity}',
    "less than all": b'{"prompt": "a", "temperature": -Infinity}',
    "too large": b'{"prompt": "a", "temperature": 1e999}',
    "thousands of digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "a name twice": b'{"prompt": "a", "prompt": "b"}',
    "a name twice, deep": b'{"prompt": "a", "metadata": {"a": 1, "a": 2}}',
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "the other half": b'{"prompt": "a", "user": "\\udfff x"}',
    "deep lists": b'{"prompt": "a", "metadata": ' + b"[" * 65 + b"]" * 65 + b"}",
    "deeper lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a control character": b'{"prompt": "a\nb"}',
    "a form": b"prompt=a&max_tokens=2",
    "a script": b"<script>alert(1)</script>",
    "zeros": b"\0" * 100,
    "a compressed body": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
}
NUMBERS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "repeat_penalty", "max_tokens", "n", "seed",
)  # fmt: skip
NO_NUMBER = ("1", "", [], [1], {}, True)
OUT_OF_RANGE = {
    "temperature": (-1, -0.001, 11, 1e300),
    "top_p": (0, -1, 1.5),
    "top_k": (-1, 0.5),
    "min_p": (-0.1, 1.1),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1),
    "repetition_penalty": (0, -1, 11),
    "max_tokens": (0, -5, 1.5, 10**9, 513, 10**30),
    "n": (0, -1, 129, 1.5, 10**30),
    "seed": (0.5,),
    "stop": ("", ["a", ""], ["a"] * 17, [1], 1, {"a": 1}, [["a"]]),
    "stream": (1, "true", "yes", []),
    "stream_options": ([], {"include_usage": 1}, {"a": 1}, {"include_usage": True}),
    "logit_bias": ([], {"a": 1}, {"-1": 1}, {"999999": 1}, {"1": 101}, {"1": "1"}, {"1.0": 1}, {"": 0}, {"٣": 1}),
    "model": (1, [], {}, "gpt-4", "../etc/passwd", "a\0b", "x" * 10_000),
    "temprature": (0.5,),
    "ignore_eos": (True,),
    "best_of": (3,),
    "min_tokens": (5,),
    "guided_json": ({},),
    "": (1,),
}
OF_CHATS = {
    "messages": (
        [], "Hi.", {}, [1], ["Hi."], [[]], [{}], [{"role": "user"}], [{"content": "Hi."}],
        [{"role": 1, "content": "a"}],
        [{"role": "user", "content": 1}], [{"role": "user", "content": {}}], [{"role": "user", "content": [1]}],
        [{"role": "user", "content": []}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "user", "content": "Hi.", "weight": 0}], [{"role": "", "content": "Hi."}],
        [{"role": "tool", "content": "Hi."}], [{"role": "assistant", "content": "Hi."}],
        [{"role": "system", "content": "Hi."}], [{"role": "user", "content": "a", "tool_calls": [1]}],
        [{"role": "user", "content": "a"}] * 2,
    ),
    "logprobs": (1, "true", 5),
    "top_logprobs": (1, -1, 21, "5", True),
    "tools": ("a", {}, [1], [{}], [{"type": "function"}], [{"type": "function", "function": {}}],
              [{"type": "function", "function": {"name": "f"}}]),
    "tool_choice": (1, {"type": "function"}, "sometimes", "required"),
    "response_format": ("json", {}, {"type": "xml"}, {"type": "json_schema"},
                        {"type": "json_schema", "json_schema": {}},
                        {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}, {"type": "text", "a": 1}),
    "functions": ([{"name": "f"}],),
    "modalities": (["audio"],),
    "reasoning_effort": ("high",),
    "max_completion_tokens": (0, 3, "2"),
    "prompt": ("a",),
}  # fmt: skip
OF_COMPLETIONS = {
    "prompt": (
        "",
        [],
        [""],
        ["a", ""],
        1,
        {},
        [1.5],
        [-1],
        [10**9],
        [[1], "a"],
        [[-1]],
        [[]],
        [None],
        ["a", 1],
        [True],
    ),
    "logprobs": (True, -1, 21, "5", 1.5),
    "echo": (1, "yes"),
    "suffix": ("a",),
    "messages": ([{"role": "user", "content": "a"}],),
}


def malformed():
    """Yield a name, an endpoint and a body for each."""
    for name, body in NO_JSON.items():
        yield name, COMPLETIONS, body
    for path, own in ((CHAT, OF_CHATS), (COMPLETIONS, OF_COMPLETIONS)):
        wrong = [(name, value) for name in NUMBERS for value in NO_NUMBER]
        wrong += [(name, value) for table in (OUT_OF_RANGE, own) for name, values in table.items() for value in values]
        for name, value in wrong:
            yield f"{name} {json.dumps(value)[:40]}", path, json.dumps(VALID[path] | {name: value}).encode()
        for name in ("messages", "prompt"):
            if name in VALID[path]:
                yield f"no {name}", path, json.dumps({k: v for k, v in VALID[path].items() if k != name}).encode()
                yield f"{name} null", path, json.dumps(VALID[path] | {name: None}).encode()


BODIES = list(malformed())


def test_there_are_many():
    assert len(BODIES) >= 300


def test_every_malformed_body_is_refused(server):
    for name, path, body in BODIES:
        found = server.http.post(path, content=body, headers=JSON)
        assert 400 <= found.status_code < 500, (name, found.text)
        error_of(found, found.status_code)
    assert server.post(CHAT, **VALID[CHAT]).status_code == 200
    assert server.service.admission.taken == 0


@pytest.mark.parametrize("path", VALID)
def test_an_error_names_the_parameter(server, path):
    for name, value in {"temperature": -1, "top_p": "a", "max_tokens": 10**9, "n": 0, "logit_bias": {"a": 1}}.items():
        assert error_of(server.post(path, **VALID[path] | {name: value}), 400)["param"] == name
    found = error_of(server.post(path, **VALID[path] | {"temprature": 1}), 400)
    assert found["message"].endswith("did you mean temperature?") and found["code"] == "unsupported_parameter"
    found = error_of(server.post(path, **VALID[path] | {"max_tokens": 10_000}), 400)
    assert "lower max_tokens to" in found["message"] and "max_new_tokens" not in found["message"]


@pytest.mark.parametrize("path", VALID)
def test_what_changes_nothing_is_taken(server, path):
    harmless = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "cache_prompt": True, "n": 1,
        "best_of": 1, "stop": [], "logit_bias": {}, "seed": None, "stream_options": None, "min_tokens": 0,
        "presence_penalty": 0, "frequency_penalty": 0.0, "repeat_penalty": 1, "repetition_penalty": 1.0, "min_p": 0,
    }  # fmt: skip
    plain, more = (server.post(path, **VALID[path] | extra).json() for extra in ({}, harmless))
    assert more["choices"] == plain["choices"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data", "text/json"]
)
def test_a_body_is_json(server, kind):
    """What a form of a page from elsewhere can send without asking is refused."""
    body = json.dumps(VALID[CHAT]).encode()
    error_of(server.http.post(CHAT, content=body, headers={"Content-Type": kind}), 415)
    error_of(server.http.post(CHAT, content=body), 415)
    error_of(server.http.post(CHAT, content=body, headers=JSON | {"Content-Encoding": "gzip"}), 415)
    found = server.http.post(CHAT, content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert found.status_code == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_other_methods_are_refused(server, method):
    found = server.http.request(method, CHAT)
    error_of(found, 405)
    assert found.headers["allow"] == "POST"
    assert server.http.request(method, "/v1/embeddings").status_code == 404


def test_random_bytes_never_end_the_server(server):
    """Valid bodies with a few bytes changed, from a seed: an answer, or a refusal in form."""
    random_bytes = random.Random(20)
    statuses = set()
    for number in range(300):
        path = (CHAT, COMPLETIONS)[number % 2]
        body = bytearray(json.dumps(VALID[path]).encode())
        for _ in range(random_bytes.randint(1, 4)):
            place = random_bytes.randrange(len(body))
            body[place : place + random_bytes.randint(0, 2)] = random_bytes.randbytes(random_bytes.randint(0, 2))
        found = server.http.post(path, content=bytes(body), headers=JSON)
        statuses.add(found.status_code)
        if found.status_code != 200:
            assert found.status_code < 500, (bytes(body), found.text)
            error_of(found, found.status_code)
    assert statuses == {200, 400, 404} or statuses == {200, 400}
