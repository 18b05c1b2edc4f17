"""`lora-alpaca verify` against servers that nobody here wrote: what is well is equal, and each fault is named.

The servers are that of llama-cpp-python, over our GGUF files, and `transformers serve`, over our `hf` folders.
"""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import gguf
import pytest
from command import run
from conftest import as_row
from environments import environment, own_environment

from lora_alpaca.export.verify.verification import SAYS
from lora_alpaca.models.base import demo_base

pytestmark = pytest.mark.clients

PATIENCE = 600  # seconds until a server listens
SHORT = ("--batch_size", 8, "--val_set_size", 0, "--cutoff_len", 128, "--dtype", "fp32",
         "--load_8bit", "False", "--prompt_template_name", "alpaca")  # fmt: skip


def done(verb, *words):
    result = run(verb, *words)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def exported(rows, tmp_path_factory):
    """Return folders: an adapter of the demo exported, in 4 bits too, another adapter, and the base all alone."""
    folder = tmp_path_factory.mktemp("served")
    data = folder / "rows.json"
    data.write_text(json.dumps([as_row(row) for row in rows]))
    learning = ("--max_steps", 40, "--learning_rate", 1e-2, *SHORT)
    done("finetune", "--output_dir", folder / "adapter", *learning)
    done("finetune", "--output_dir", folder / "another", "--data_path", data, *learning)
    done("finetune", "--output_dir", folder / "nothing", "--max_steps", 1, "--learning_rate", 1e-6, *SHORT)
    export = ("export", "--base_model", "demo", "--lora_weights")
    done(*export, folder / "adapter", "--output_dir", folder / "well", "--format", "hf,gguf,gguf_lora")
    done(*export, folder / "adapter", "--output_dir", folder / "q4", "--format", "gguf", "--gguf_type", "q4_0")
    done(*export, folder / "another", "--output_dir", folder / "other", "--format", "hf,gguf")
    done(*export, folder / "nothing", "--output_dir", folder / "base", "--format", "gguf", "--dtype", "fp32")
    return SimpleNamespace(
        folder=folder,
        hf=folder / "well" / "hf",
        gguf=file(folder / "well" / "gguf"),
        lora=file(folder / "well" / "gguf_lora"),
        q4=file(folder / "q4"),
        other=file(folder / "other" / "gguf"),
        other_hf=folder / "other" / "hf",
        base=file(folder / "base"),
    )


def file(folder):
    [found] = folder.glob("*.gguf")
    return found


@contextmanager
def listening(path, *command):
    """Yield the address of a server that a command starts, when it answers at a path."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [str(word) for word in (*command, "--port", port)],
        env=own_environment() | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    reader = threading.Thread(target=process.stderr.read, daemon=True)  # so that it never waits for us
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            assert process.poll() is None, process.stderr.read()[-2000:]
            try:
                urllib.request.urlopen(f"{address}{path}", timeout=30).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"no answer after {PATIENCE} s")
        reader.start()
        yield address
    finally:
        process.terminate()
        process.wait(30)
        if reader.ident is not None:
            reader.join(30)
        process.stderr.close()


def llama_cpp(model, *words):
    """Return a context with llama-cpp-python's server of a GGUF file."""
    server = (environment("llama_cpp"), "-m", "llama_cpp.server", "--model", model, "--model_alias", "served")
    return listening("/v1/models", *server, "--logits_all", "true", "--n_ctx", 1024, *words)


def transformers_serve(folder, *words):
    """Return a context with `transformers serve` of a folder."""
    command = environment("serve").parent / "transformers"
    # /v1/models looks through the whole cache of the hub, which takes minutes
    return listening("/health", command, "serve", folder, "--device", "cpu", *words)


def verify(address, exported, *words):
    return run("verify", address, "--receipt", exported.folder / "well", "--timeout", 600, *words)  # a busy machine


@contextmanager
def sampling(address):
    """Yield the address of a proxy that sets the temperature of every request, as gateways with presets do."""

    class Proxy(BaseHTTPRequestHandler):
        def respond(self, data=None):
            asked = urllib.request.Request(address + self.path, data, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(asked) as response:
                    status, content = response.status, response.read()
            except urllib.error.HTTPError as error:
                status, content = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.respond()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.respond(json.dumps(body | {"temperature": 1.0}).encode())

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


# What of AMX a processor says that it has, a virtual machine may refuse: llama.cpp then dies of its own q4_0, whose
# values are therefore served in 16 bits.


def without_end(model, to):
    """Copy a GGUF file, with the unknown token named as the one that ends an answer, and the one that does renamed."""
    shutil.copyfile(model, to)
    fields = gguf.GGUFReader(to, "r+").fields
    tokens, end = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.eos_token_id"]
    name = tokens.parts[tokens.data[end.parts[-1][0]]]
    assert bytes(name) == b"</s>"
    name[:] = list(b"<xs>")  # llama.cpp knows that name
    end.parts[-1][0] = 0
    return to


def with_values_of(quantised, model, to):
    """Copy a GGUF file in 16 bits, with the values that a quantised one has."""
    shutil.copyfile(model, to)
    values = {tensor.name: tensor for tensor in gguf.GGUFReader(quantised).tensors}
    for tensor in gguf.GGUFReader(to, "r+").tensors:
        held = values[tensor.name]
        tensor.data[:] = gguf.quants.dequantize(held.data, held.tensor_type).reshape(tensor.data.shape)
    return to


# ------------------------------------------------------------------------------------------------------- llama.cpp

LLAMA_CPP = {
    "equal": lambda exported: (exported.gguf,),
    "base": lambda exported: (exported.base,),
    "prompt": lambda exported: (exported.gguf, "--chat_format", "chatml"),
    "late": lambda exported: (without_end(exported.gguf, exported.folder / "endless.gguf"),),
    "quantised": lambda exported: (with_values_of(exported.q4, exported.gguf, exported.folder / "q4.gguf"),),
    "other": lambda exported: (exported.other,),
    "sampling": lambda exported: (exported.gguf,),
}


@pytest.mark.parametrize("fault", LLAMA_CPP)
def test_llama_cpp(exported, fault, record_property):
    with llama_cpp(*LLAMA_CPP[fault](exported)) as address:
        if fault == "sampling":
            with sampling(address) as proxy:
                found = verify(proxy, exported)
        else:
            found = verify(address, exported)
    record_property("page", found.out.splitlines())
    expected = [SAYS["equal"], SAYS["rounding"]] if fault == "equal" else [SAYS[fault]]
    assert any(f"EQUAL: {said}\n" in found.out for said in expected), found
    assert found.code == (fault != "equal")


def test_llama_cpp_with_the_adapter_as_a_file_of_its_own(exported, record_property):
    with llama_cpp(exported.base, "--lora_path", exported.lora) as address:
        found = verify(address, exported)
    record_property("page", found.out.splitlines())
    assert found.code == 0, found


# ---------------------------------------------------------------------------------------------- transformers serve


def changed(exported, name, **files):
    """Return a copy of the `hf` folder with other files."""
    folder = exported.folder / name
    shutil.copytree(exported.hf, folder)
    for file, content in files.items():
        (folder / file).write_text(content)
    return folder


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
DRAWN = '{"eos_token_id": 2, "do_sample": true}'  # without which this server never samples
SERVE = {
    "equal": lambda exported: exported.hf,
    "base": lambda exported: demo_base(),
    "prompt": lambda exported: changed(exported, "chatml", **{"chat_template.jinja": CHATML}),
    "late": lambda exported: changed(exported, "endless", **{"generation_config.json": '{"eos_token_id": 0}'}),
    "other": lambda exported: exported.other_hf,
    "sampling": lambda exported: changed(exported, "drawn", **{"generation_config.json": DRAWN}),
}


@pytest.mark.parametrize("fault", SERVE)
def test_transformers_serve(exported, fault, record_property):
    folder = os.fspath(SERVE[fault](exported))
    with transformers_serve(folder) as address:
        if fault == "sampling":
            with sampling(address) as proxy:
                found = verify(proxy, exported, "--model", folder)
        else:
            found = verify(address, exported, "--model", folder)
    record_property("page", [line.replace(os.fspath(exported.folder), "...") for line in found.out.splitlines()])
    expected = [SAYS["equal"], SAYS["rounding"]] if fault == "equal" else [SAYS[fault]]
    assert any(f"EQUAL: {said}\n" in found.out for said in expected), found
    assert found.code == (fault != "equal")
