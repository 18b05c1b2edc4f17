"""`generate --serve` as a process: the way from the command to the first answer, and every way out."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from conftest import ROOT, as_row

from lora_alpaca import FinetuneConfig, GenerateConfig, finetune
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference import terminal

PATIENCE = 120  # seconds until it answers
ASK = {"messages": [{"role": "user", "content": "Where does the owl live?"}], "temperature": 0}
DEMO = ("--base_model", "demo", "--lora_weights", "none", "--prompt_template", "alpaca")
NEVER_ENDS = {"logit_bias": {"2": -100}, "max_tokens": 900}  # without its end token


@contextlib.contextmanager
def started(port, *flags):
    """Yield a process that serves, whatever its state."""
    words = ["--serve", "--server_port", str(port), "--device", "cpu", "--dtype", "fp32", *map(str, flags)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_well(process, port):
    """Return the statuses of /health until it is well."""
    statuses = []
    end = time.monotonic() + PATIENCE
    while not statuses or statuses[-1] != 200:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        with contextlib.suppress(httpx.ConnectError):
            statuses.append(httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code)
        time.sleep(0.05)
    return statuses


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_server_in_order(free_port, number, code):
    """What is short finishes, what is endless is cut and told so, what comes late is refused; all in 5 seconds."""
    with started(free_port, *DEMO) as process:
        statuses = wait_until_well(process, free_port)
        assert set(statuses[:-1]) <= {503}
        url, found = f"http://127.0.0.1:{free_port}/v1/chat/completions", {}

        def ask(name, **more):
            with httpx.Client(trust_env=False, timeout=30) as client:
                found[name] = client.post(url, json=ASK | more)

        questions = {"short": {"max_tokens": 8}}
        if number == signal.SIGTERM:
            endless = NEVER_ENDS | {"n": 8, "temperature": 1, "top_p": 1, "stop": ["\0"]}
            questions = {"stream": endless | {"stream": True}, "whole": endless} | questions
        threads = [threading.Thread(target=ask, args=(name,), kwargs=more) for name, more in questions.items()]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        since = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        took = time.monotonic() - since
        for thread in threads:
            thread.join(10)
        assert process.returncode == code
        assert took < 5 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))  # it shares the processor
        assert "Traceback" not in errors
        assert errors.splitlines()[-1].startswith(f"stopped by {signal.Signals(number).name}: ")
        assert found["short"].status_code == 200
        if "stream" in found and found["whole"].status_code != 200:
            assert found["whole"].json()["error"]["message"] == "the server is stopping"
            last = [line for line in found["stream"].text.splitlines() if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"


def test_a_signal_while_the_model_loads_ends_it(free_port):
    with started(free_port, *DEMO) as process:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(httpx.ConnectError):
                if httpx.get(f"http://127.0.0.1:{free_port}/health", trust_env=False).status_code == 503:
                    break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 143
        assert "Traceback" not in errors


def test_a_model_that_does_not_load_is_one_line(free_port, run_script, tmp_path):
    done = run_script("generate.py", "--serve", "--base_model", tmp_path, "--server_port", free_port, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --base_model")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_verify_finds_it_equal(free_port, rows, tmp_path, run_script):
    """The adapter is exported, and served by its folder: `lora-alpaca verify` asks whether that is what was trained."""
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([as_row(row) for row in rows]))
    adapter = finetune(
        FinetuneConfig(
            data_path=str(data), output_dir=str(tmp_path / "adapter"), max_steps=20, learning_rate=1e-2, batch_size=8,
            val_set_size=0, cutoff_len=128, dtype="fp32", device="cpu", load_8bit=False,
        )
    ).output_dir  # fmt: skip
    merged = tmp_path / "merged"
    run_script("export_hf_checkpoint.py", "--lora_weights", adapter, "--output_dir", merged, cwd=tmp_path, check=True)
    for flags in (("--lora_weights", adapter), ("--base_model", merged, "--lora_weights", "none")):
        with started(free_port, *flags) as process:
            wait_until_well(process, free_port)
            models = httpx.get(f"http://127.0.0.1:{free_port}/v1/models", trust_env=False).json()["data"]
            verb = [sys.executable, "-m", "lora_alpaca", "verify", "--endpoint", f"http://127.0.0.1:{free_port}/v1"]
            named = ["--model", models[0]["id"]] * (len(models) > 1)
            done = subprocess.run([*verb, "--receipt", merged, *named], capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "EQUAL" in done.stdout


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(terminal, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(ConfigError, match=r'--serve needs uvicorn \(pip install "lora-alpaca\[serve\]"\)'):
        terminal.generate(GenerateConfig(serve=True, base_model="none"))
