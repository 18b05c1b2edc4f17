"""The page in a real browser: what a person types, sees and stops, and that nothing is fetched from elsewhere.

Chromium is driven through its debugging pipe, so that no driver and no further package is needed.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import tokenizers
import torch
import transformers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (chromium, chromium-browser, google-chrome)"),
]

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1280,900",
    "--remote-debugging-pipe",
]


class Browser:
    """A headless Chromium with one tab, and every address that the tab has asked for."""

    def __init__(self, profile: Path):
        command_end, self._commands = os.pipe()
        self._events, event_end = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4, each ended by a NUL.
        script = f'exec "$@" 3<&{command_end} 4>&{event_end}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(command_end, event_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_end)
        os.close(event_end)
        self._session: str | None = None
        self._sent, self._unread = 0, b""
        self.requests: list[str] = []
        pages = [info for info in self.send("Target.getTargets")["targetInfos"] if info["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the browser's answer to a command of the DevTools protocol."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("method") in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                self.requests.append(answer["params"].get("request", answer["params"])["url"])
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            received = os.read(self._events, 1 << 16)
            assert received, "Chromium has ended"
            self._unread += received
        message, self._unread = self._unread.split(b"\0", 1)
        return dict(json.loads(message))

    def js(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> Any:
        """Return the first true value of an expression."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"still not true after {seconds} s: {expression}"
            time.sleep(0.05)
        return value

    def close(self) -> None:
        """End the browser."""
        os.write(self._commands, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._events)


class Page:
    """Our page as its reader knows it: boxes and controls by their labels, buttons by their words."""

    def __init__(self, browser: Browser, url: str):
        self.browser, self.url, self.js, self.wait = browser, url, browser.js, browser.wait
        self.open()

    def open(self) -> None:
        """Load the page anew, every control back at its default."""
        self.browser.send("Page.navigate", url="about:blank")
        self.browser.send("Page.navigate", url=self.url)
        fields = {"textarea": 3, "input[type=number]": 5, "input[type=checkbox]": 1, "button.primary": 1}
        self.wait(" && ".join(f"document.querySelectorAll('{it}').length === {count}" for it, count in fields.items()))

    def box(self, label: str) -> str:
        """Return an expression for the field under a label."""
        named = (
            f"[...it.querySelectorAll('label, [data-testid=block-info]')].some(it => it.innerText.trim() === '{label}')"
        )
        return f"[...document.querySelectorAll('.block')].filter(it => {named}).at(-1).querySelector('textarea, input')"

    def type(self, label: str, text: str) -> None:
        """Replace the text of a field by typing, as a person does."""
        self.js(f"(() => {{ const box = {self.box(label)}; box.focus(); box.select(); }})()")
        self.browser.send("Input.insertText", text=text)
        self.js(f"{self.box(label)}.blur()")

    def value(self, label: str) -> str:
        """Return what a field holds."""
        return str(self.js(f"{self.box(label)}.value"))

    def press(self, words: str) -> None:
        """Press a button."""
        self.js(f"[...document.querySelectorAll('button')].find(it => it.textContent.trim() === {words!r}).click()")

    def submit(self) -> None:
        """Press submit, and record every state of the output box from then on."""
        self.js(
            f"(() => {{ window.seen = []; const box = {self.box('Output')}; setInterval(() => {{"
            " if (box.value !== (seen.at(-1) ?? '')) seen.push(box.value) }, 1); })()"
        )
        self.press("Submit")

    def answer(self) -> str:
        """Wait until the page says that the answer is complete, and return it."""
        output = self.box("Output")
        done = f"{output}.closest('.block').querySelector('[data-testid=status-tracker]').classList.contains('hide')"
        self.wait(f"{output}.value !== '' && {done}")
        return self.value("Output")

    def ask(self, **controls: str) -> tuple[str, list[str]]:
        """Return the answer on a fresh page with these controls, and the states in which it was seen."""
        self.open()
        for name, text in controls.items():
            self.type(name.replace("_", " "), text)
        self.submit()
        return self.answer(), self.js("seen")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama that speaks ten words and never ends by itself."""
    folder = tmp_path_factory.mktemp("base")
    words = ["<unk>", "hay", "wool", "hum", "herd", "calm", "soft", "grass", "llama", "spit", "pasture"]
    vocab = {word: number for number, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,  # wide enough for the answer to depend on the prompt
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = transformers.LlamaForCausalLM(config)
    llama.generation_config.suppress_tokens = [0]  # <unk> is never shown
    llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of `python generate.py`, running."""
    script = Path(__file__).parents[2] / "generate.py"
    model = ["--base_model", str(base), "--prompt_template", "alpaca", "--device", "cpu", "--dtype", "fp32"]
    server = subprocess.Popen(
        [sys.executable, str(script), *model, "--temperature", "0", "--max_new_tokens", "60"],
        cwd=tmp_path_factory.mktemp("server"),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        said.append(line)
        if line.startswith("listening on "):
            break
    else:
        pytest.fail("".join(said))
    yield line.split()[2]
    server.kill()
    server.wait()
    server.stderr.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Page:
    browser.requests.clear()
    return Page(browser, url)


def test_answer_streams(page: Page) -> None:
    # So long that even a busy machine draws it in several steps.
    answer, seen = page.ask(Instruction="Tell me about hay.", Input="in winter", Max_tokens="1000")
    assert len(answer.split()) == 1000
    assert len(seen) > 2
    assert all(after.startswith(before) and after != before for before, after in itertools.pairwise(seen))
    assert seen[-1] == answer


def test_controls_have_their_effect(page: Page) -> None:
    likeliest, _ = page.ask(Max_tokens="20")
    assert len(likeliest.split()) == 20
    assert page.ask(Max_tokens="20")[0] == likeliest
    assert page.ask(Max_tokens="1")[0] == likeliest.split()[0]
    assert page.ask(Max_tokens="20", Temperature="2", Top_p="1", Top_k="0")[0] != likeliest
    assert page.ask(Max_tokens="20", Temperature="2", Top_p="0.01")[0] == likeliest
    assert page.ask(Max_tokens="20", Temperature="2", Top_k="1")[0] == likeliest
    assert page.ask(Max_tokens="20", Instruction="wool wool")[0] != likeliest


def test_beams_and_unticked_stream_show_one_piece(page: Page) -> None:
    answer, seen = page.ask(Beams="3")
    assert seen == [answer]
    assert len(answer.split()) == 60  # as `--max_new_tokens` says
    page.open()
    page.js(f"{page.box('Stream output')}.click()")
    page.submit()
    assert page.answer() == page.js("seen.join('|')")


def test_stop_ends_the_answer_and_frees_the_model(page: Page) -> None:
    page.type("Max tokens", "2000")
    page.submit()
    page.wait("seen.length > 5")
    page.press("Stop")
    stopped = page.answer()
    assert 5 <= len(stopped.split()) < 1900
    assert page.js("document.querySelector('.error')") is None
    page.type("Max tokens", "2")
    page.press("Submit")
    page.wait(f"{page.box('Output')}.value.split(' ').length === 2")


def test_error_is_shown_and_the_next_answer_comes(page: Page) -> None:
    page.type("Instruction", "hay " * 5000)
    page.press("Submit")
    shown = page.wait("document.querySelector('.toast-body')?.textContent ?? ''")
    assert "tokens; this model takes at most 4096" in shown
    assert len(page.ask(Max_tokens="3")[0].split()) == 3


def test_nothing_is_fetched_from_elsewhere(page: Page) -> None:
    page.ask(Max_tokens="3")
    asked = [urlsplit(url) for url in page.browser.requests]
    assert {url.hostname for url in asked if url.scheme not in ("data", "blob", "about")} == {"127.0.0.1"}


def test_one_column_on_a_phone(page: Page) -> None:
    sides = f"[{page.box('Instruction')}, {page.box('Output')}].map(it => it.getBoundingClientRect())"
    assert page.js(f"(([left, right]) => left.right < right.left)({sides})")
    page.browser.send("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    try:
        page.open()
        assert page.js(f"(([above, below]) => above.bottom < below.top)({sides})")
        assert page.js("document.documentElement.scrollWidth") == 390
    finally:
        page.browser.send("Emulation.clearDeviceMetricsOverride")
