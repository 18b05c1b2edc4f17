"""`lora-alpaca verify` against a server that is set up well, and spoilt in every way that is to be named."""

import copy
import json
import socket
from functools import partial

import pytest
import torch
from command import run
from fake_server import Server, running

from lora_alpaca.artifacts.chat_template import outgoing
from lora_alpaca.export.verify import greedy, served_receipt, verification
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import load_template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


class Scene:
    """A base, the model that was trained of it, and the folder with the receipt."""

    def __init__(self, folder):
        base = locate_base("demo")
        self.tokenizer, _ = load_tokenizer(base, None, trained=False)
        self.base, _ = load_base(base, DeviceSpec(torch.device("cpu"), torch.float32, bits=16))
        self.trained, self.other = changed(self.base, 1), changed(self.base, 2)
        template = load_template("alpaca").bound(self.tokenizer)
        self.chat_template, notes = outgoing(self.tokenizer, template)
        assert not notes
        self.folder = folder
        content = served_receipt.build(
            partial(greedy.continuations, self.trained), partial(greedy.continuations, self.base), self.tokenizer,
            template, [self.tokenizer.eos_token_id], partial(greedy.logprobs, self.base),
            partial(greedy.rounding, self.trained), new_tokens=18, most_tokens=230,
        )  # fmt: skip
        (folder / served_receipt.FILE).write_text(json.dumps(content))
        self.content = content

    def server(self, **faults):
        well = {"model": self.trained, "tokenizer": self.tokenizer, "chat_template": self.chat_template}
        return Server(**well | {"stop_ids": [self.tokenizer.eos_token_id]} | faults)

    def verify(self, server, *words, receipt=None):
        with running(server) as address:
            return run("verify", "--endpoint", address, "--receipt", receipt or self.folder, *words)


def changed(model, seed):
    """Return a model with other weights, by as much as an adapter of rank 4 may change them."""
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            rows, columns = weight.shape
            delta = torch.randn(rows, 4, generator=draw) @ torch.randn(4, columns, generator=draw)
            weight.data += 0.2 * delta * weight.norm() / delta.norm()
    return model


def in_4_bits(model):
    """Return a model with weights as llama.cpp's q4_0 holds them: 16 steps for every 32 of them."""
    model = copy.deepcopy(model)
    for weight in model.parameters():
        if weight.dim() == 2:
            blocks = weight.data.reshape(-1, 32)
            step = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
            weight.data = ((blocks / step).round().clamp(-8, 7) * step).nan_to_num(0).reshape(weight.shape)
    return model


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("exported"))


SPOILT = {
    "base": lambda scene: {"model": scene.base},
    "prompt": lambda scene: {"chat_template": CHATML},
    "late": lambda scene: {"stop_ids": []},
    "quantised": lambda scene: {"model": in_4_bits(scene.trained)},
    "other": lambda scene: {"model": scene.other},
    "sampling": lambda scene: {"temperature": 1.0},
    "early": lambda scene: {"stop_word": " is"},
}


def test_the_trained_model_is_called_equal(scene):
    server = scene.server()
    done = scene.verify(server)
    assert done.code == 0
    assert done.err == ""
    assert "EQUAL: equal: the server answers as the trained model, token for token" in done.out
    number = len(scene.content["probes"])
    for route in ("completions:", "chat:"):
        assert f"{route:13}{number} of {number} answers as trained (100% of the tokens)" in done.out
    assert "not checked" not in done.out
    paths = [request["path"] for request in server.requests]
    assert [paths.count(f"/v1/{path}") for path in ("models", "completions", "chat/completions")] == [
        1,
        number + min(number, verification.TWICE),
        number,
    ]


@pytest.mark.parametrize("fault", SPOILT)
def test_what_is_spoilt_is_named(scene, fault):
    done = scene.verify(scene.server(**SPOILT[fault](scene)))
    assert done.code == 1
    assert f"NOT EQUAL: {verification.SAYS[fault]}\n" in done.out
    assert done.err.startswith("error: --endpoint http://127.0.0.1:")
    assert done.err.endswith(f"{verification.SAYS[fault]}\n")
    assert "what to do: " in done.out
    assert "the first answer that differs, to the probe" in done.out


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["base", "prompt", "late", "other", "sampling"])
def test_what_is_spoilt_is_named_without_log_probabilities(scene, fault):
    done = scene.verify(scene.server(**SPOILT[fault](scene), logprobs=False))
    assert f"NOT EQUAL: {verification.SAYS[fault]}\n" in done.out
    assert "not checked: log-probabilities, which the server does not give" in done.out


def test_16_bits_are_rounding(scene):
    done = scene.verify(scene.server(model=copy.deepcopy(scene.trained).bfloat16()))
    assert done.code == 0
    assert f"EQUAL: {verification.SAYS['rounding']}\n" in done.out


@pytest.mark.parametrize("fault", ["base", None])
def test_a_server_of_chats_alone(scene, fault):
    done = scene.verify(scene.server(**SPOILT[fault](scene) if fault else {}, completions=False))
    assert verification.SAYS[fault or "equal"] in done.out
    assert "not checked: the prompt as text: the server does not answer /completions (404: Not Found)" in done.out


def test_another_prompt_of_a_server_of_chats_alone_is_told_by_its_length(scene):
    done = scene.verify(scene.server(chat_template=CHATML, completions=False))
    assert f"NOT EQUAL: {verification.SAYS['prompt']}\n" in done.out
    assert "its prompts have " in done.out


def test_a_server_without_chats(scene):
    done = scene.verify(scene.server(chat=False))
    assert done.code == 0
    assert "not checked: the chat template: the server does not answer /chat/completions (404: Not Found)" in done.out


def test_a_token_at_the_beginning_that_is_added_twice_is_another_prompt(scene):
    tokenizer = copy.deepcopy(scene.tokenizer)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    done = scene.verify(scene.server(bos_twice=True))
    if done.code:
        assert f"NOT EQUAL: {verification.SAYS['prompt']}\n" in done.out
    assert "its prompts have 1 tokens more than in training, as it counts them" in done.out


def test_a_server_that_refuses_what_it_does_not_know(scene):
    server = scene.server(refuses=("repeat_penalty", "logprobs"), ids=False, echo=True)
    done = scene.verify(server)
    assert done.code == 0
    asked = [request for request in server.requests if request["path"] == "/v1/chat/completions"]
    assert [sorted({"logprobs", "repeat_penalty"} & set(request)) for request in asked[:4]] == [
        ["logprobs", "repeat_penalty"],
        ["repeat_penalty"],
        ["logprobs"],
        [],
    ]
    assert all(not {"logprobs", "repeat_penalty"} & set(request) for request in asked[4:])
    assert len(asked) == len(scene.content["probes"]) + 3


# ------------------------------------------------------------------------------------- what is sent, and to whom


def test_only_our_own_probes_are_sent_and_no_header_tells_of_this_machine(scene, monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "https://elsewhere.invalid")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: 1")
    server = scene.server()
    reached = set()

    def connect(self, address, connect=socket.socket.connect):
        reached.add(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert scene.verify(server).code == 0
    assert len(reached) == 1
    ours = [probe[key] for probe in scene.content["probes"] for key in ("prompt", "messages")]
    for request in server.requests[1:]:
        assert request.get("prompt", request.get("messages")) in ours
    allowed = {"host", "content-type", "content-length", "accept", "user-agent", "connection"}
    assert {name for headers in server.headers for name in headers} <= allowed
    assert {headers["user-agent"] for headers in server.headers} == {"lora_alpaca"}


def test_a_key_is_sent_and_never_printed(scene, tmp_path, monkeypatch):
    (tmp_path / "key").write_text("sk-very-secret\n")
    server = scene.server(key="sk-very-secret")
    done = scene.verify(server, "--api_key_file", tmp_path / "key")
    assert done.code == 0
    assert "very-secret" not in done.out + done.err
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-secret")
    done = scene.verify(server)
    assert done.code == 2
    assert "401: no such key; set the variable OPENAI_API_KEY, or name a file with --api_key_file" in done.err
    assert "wrong-secret" not in done.out + done.err


# ------------------------------------------------------------------------------------------------ a user's mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--endpoint is missing: name the server, as in --endpoint http://localhost:8000"),
        (["--endpoint", "localhost:8000"], "--endpoint localhost:8000: no address of a server"),
        (["--endpoint", "http://me:secret@localhost"], "an address with a password in it"),
        (["--endpoint", "http://127.0.0.1:9"], "--endpoint http://127.0.0.1:9/v1: cannot be reached"),
        (["http://127.0.0.1:9", "--api_key_file", "nowhere"], "--api_key_file nowhere: No such file or directory"),
        (["http://127.0.0.1:9", "--receipt", "nowhere"], "--receipt nowhere: holds no served_receipt.json"),
    ],
)
def test_a_mistake_is_one_line(scene, words, said):
    receipt = [] if "--receipt" in words else ["--receipt", scene.folder]
    done = run("verify", *words, *receipt)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert said in done.err
    assert "secret" not in done.err


def test_several_models_are_listed(scene):
    done = scene.verify(scene.server(names=("base", "served")))
    assert done.code == 2
    assert "serves 2 models (base, served); name one with --model" in done.err
    assert scene.verify(scene.server(names=("base", "served")), "--model", "served").code == 0


def test_a_server_that_answers_nothing(scene):
    done = scene.verify(scene.server(chat=False, completions=False))
    assert done.code == 2
    assert "gives no answers (404: Not Found); see --model served" in done.err


def test_the_library_that_is_not_installed(scene, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    done = run("verify", "http://127.0.0.1:9", "--receipt", scene.folder)
    assert done.code == 2
    assert done.err == 'error: verify needs the library openai: pip install "lora-alpaca[verify]"\n'


def test_the_receipt_is_found_in_a_folder_of_several_formats(scene, tmp_path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / served_receipt.FILE).write_text(json.dumps(scene.content))
    assert scene.verify(scene.server(), receipt=tmp_path).code == 0
