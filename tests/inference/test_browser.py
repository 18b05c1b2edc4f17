"""The page in a real browser: what a person types, sees and stops, and that nothing is fetched from elsewhere."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import peft
import psutil
import pytest
import tokenizers
import torch
import transformers
from chromium import CHROMIUM, Browser

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data import Rows

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (chromium, chromium-browser, google-chrome)"),
]

AS_A_PERSON = 0.15  # seconds before a key or a button is pressed
CONTEXT = 65536  # so long that an answer can be stopped
SCRIPT = "<img/src=x/onerror=window.hit=1>"  # a word of the model
WORDS = ["</s>", "hay", "wool", "hum", "herd", "calm", "soft", "grass", "llama", "spit", SCRIPT]
EXAMPLE = "<b>wool</b><img src=//elsewhere.example/x onerror=window.hit=1>"
TABS = ("Chat", "Instruction", "Compare")


class Page:
    """Our page as its reader knows it: boxes and controls by their labels, buttons by their words."""

    def __init__(self, browser: Browser, url: str):
        self.browser, self.url, self.js, self.wait = browser, url, browser.js, browser.wait
        self.open()

    def open(self, **controls: str) -> None:
        """Load the page anew, and set some of its controls."""
        self.browser.send("Page.navigate", url="about:blank")
        self.browser.send("Page.navigate", url=self.url)
        self.wait("!!document.querySelector('.hello')")
        if controls:
            self.wait("!!document.querySelector('#settings button')")
            self.js("document.querySelector('#settings button').click()")
            self.wait("document.querySelectorAll('input[type=number]').length === 7")
        typed = {label.replace("_", " "): text for label, text in controls.items()}
        while any(self.js(f"{self.box(label)}.value") != text for label, text in typed.items()):
            for label, text in typed.items():
                self.type(label, text)
            time.sleep(AS_A_PERSON)  # a box that has only just been drawn may be drawn anew, without what was typed

    def tab(self, name: str) -> None:
        """Turn to a tab."""
        self.js(f"[...document.querySelectorAll('[role=tab]')].find(it => it.textContent.trim() === '{name}').click()")
        self.wait(f"document.querySelector('[role=tab][aria-selected=true]').textContent.trim() === '{name}'")

    def box(self, label: str) -> str:
        """Return an expression for the visible field under a label."""
        labels = "[...it.querySelectorAll('label, [data-testid=block-info]')]"
        named = f"it.offsetParent && {labels}.some(it => it.innerText.trim() === '{label}')"
        return f"[...document.querySelectorAll('.block')].filter(it => {named}).at(-1).querySelector('textarea, input')"

    def type(self, label: str, text: str) -> None:
        """Replace the text of a field by typing, as a person does."""
        self.wait(f"[{self.box(label).replace('.querySelector(', '?.querySelector(')}].some(Boolean)")
        self.js(f"(() => {{ const box = {self.box(label)}; box.focus(); box.select(); }})()")
        if text:
            self.browser.send("Input.insertText", text=text)
        else:
            self.key("Delete", 46)
        self.js(f"{self.box(label)}.blur()")

    def key(self, name: str, code: int, text: str = "", shift: bool = False) -> None:
        """Press a key."""
        event = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.browser.send("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.browser.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def press(self, words: str) -> None:
        """Press the last visible button with these words."""
        named = f"it => it.offsetParent && !it.disabled && it.role !== 'tab' && it.textContent.trim() === {words!r}"
        found = f"[...document.querySelectorAll('button')].filter({named})"
        self.wait(f"{found}.length")
        time.sleep(AS_A_PERSON)
        self.js(f"{found}.at(-1).click()")

    def say(self, text: str) -> None:
        """Type a message and press Enter; every state of the answers is kept in `seen`."""
        self.js(
            "(() => { window.seen = []; clearInterval(window.watching); window.watching = setInterval(() => {"
            " const said = [...document.querySelectorAll('.answer .text')].at(-1)?.textContent ?? '';"
            " if (said !== (seen.at(-1) ?? '')) seen.push(said) }, 1);"
            " document.querySelector('#message textarea').focus(); })()"
        )
        self.browser.send("Input.insertText", text=text)
        time.sleep(AS_A_PERSON)
        self.key("Enter", 13, "\r")

    def turns(self, count: int) -> list[list[str]]:
        """Wait until there are so many turns and no answer is being written; return their three texts."""
        self.wait(f"document.querySelectorAll('.turn').length === {count} && !document.querySelector('.log.busy')", 40)
        parts = "['.question .text', '.answer .text', '.note'].map(part => it.querySelector(part).textContent)"
        return list(self.js(f"[...document.querySelectorAll('.turn')].map(it => {parts})"))

    def ask(self, text: str = "hay", **controls: str) -> tuple[str, str]:
        """Return the answer, and the line under it, of a page opened anew with these controls."""
        self.open(**controls)
        self.say(text)
        ((_, answer, note),) = self.turns(1)
        return answer, note

    def message(self) -> str:
        """Wait for an error to be shown, and return its text."""
        return str(self.wait("document.querySelector('.toast-body')?.textContent ?? ''"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random adapter on a tiny random Llama of ten words, which never ends by itself."""
    base = tmp_path_factory.mktemp("base")
    vocab = {word: number for number, word in enumerate(WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="hay"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # wide enough for the answer to depend on the prompt
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # the first feature is the same everywhere, and forbids the end
        llama.model.embed_tokens.weight[:, 0] = 3
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        llama.lm_head.weight[:, 0] = 0
        llama.lm_head.weight[0, 0] = -100
    llama.save_pretrained(base)
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    lora = peft.LoraConfig(
        init_lora_weights=False, target_modules=["q_proj", "v_proj"], base_model_name_or_path=str(base)
    )
    peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), lora).save_pretrained(folder)
    rows = tmp_path_factory.mktemp("data") / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"hay {EXAMPLE}", "input": EXAMPLE, "output": EXAMPLE}] * 4))
    options = FinetuneConfig(data_path=str(rows), val_set_size=2).model_dump()
    record = {"kind": "adapter", "status": "finished", "run": "1", "base_model": str(base), "base_revision": None}
    record |= {"options": options, "data_sha256": Rows(str(rows)).digest}
    (folder / "lora_alpaca.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def served(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """Return the address of `python generate.py`, running, and its process."""
    script = Path(__file__).parents[2] / "generate.py"
    model = ["--lora_weights", str(adapter), "--prompt_template", "vicuna", "--device", "cpu", "--dtype", "fp32"]
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
    yield line.split()[2], psutil.Process(server.pid)
    server.kill()
    server.wait()
    server.stderr.close()


@pytest.fixture(scope="module")
def url(served: tuple[str, psutil.Process]) -> str:
    return served[0]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    browser.requests.clear()
    yield Page(browser, url)
    browser.send("Emulation.clearDeviceMetricsOverride")
    browser.dark(False)


# ------------------------------------------------------------------------------------------------------------- chat


def test_an_answer_streams_and_says_how_it_ended(page: Page) -> None:
    # So long that even a busy machine draws it in several steps.
    answer, note = page.ask("hay hum", Max_new_tokens="1000")
    seen = page.js("seen")
    assert note.startswith("cut off at max new tokens · 1,000 tokens · ") and note.endswith(" tokens/s")
    assert len(seen) > 2
    assert all(after.startswith(before) and after != before for before, after in itertools.pairwise(seen))
    assert seen[-1] == answer
    assert page.ask(Stop_texts=answer.split()[3])[1].startswith("ended at the stop text")


def test_enter_sends_and_shift_enter_makes_a_line(page: Page) -> None:
    page.js("document.querySelector('#message textarea').focus()")
    page.browser.send("Input.insertText", text="hay")
    page.key("Enter", 13, "\r", shift=True)
    page.browser.send("Input.insertText", text="wool")
    assert page.js("document.querySelector('#message textarea').value") == "hay\nwool"
    page.key("Enter", 13, "\r")
    assert page.turns(1)[0][0] == "hay\nwool"
    assert page.js("document.querySelector('#message textarea').value") == ""


def test_stop_ends_the_answer_and_frees_the_model(page: Page) -> None:
    page.open(Max_new_tokens="60000")
    page.say("hay")
    page.wait("seen.length > 3")
    page.js("document.querySelector('#message .stop-button').click()")
    ((_, answer, note),) = page.turns(1)
    assert 3 <= len(answer.split()) < 59000
    assert note.startswith("stopped · ")
    assert page.js("document.querySelector('.toast-body')") is None
    page.type("Max new tokens", "2")
    page.say("hum")
    assert "· 2 tokens" in page.turns(2)[1][2]


def test_a_reader_who_leaves_frees_the_model(page: Page, served: tuple[str, psutil.Process]) -> None:
    page.open(Max_new_tokens="60000")
    page.say("hay")
    page.wait("seen.length > 3")
    page.browser.send("Page.navigate", url="about:blank")
    deadline = time.monotonic() + 4  # a fraction of what the answer takes
    while served[1].cpu_percent(0.5) > 30:
        assert time.monotonic() < deadline, "the model goes on"


def test_visitors_do_not_wait_for_each_other(page: Page, url: str, tmp_path: Path) -> None:
    page.open(Max_new_tokens="60000")
    other = Browser(tmp_path)
    try:
        visitor = Page(other, url)
        page.say("hay")
        page.wait("seen.length > 3")
        visitor.say("hum")
        assert "· 60 tokens" in visitor.turns(1)[0][2]
        assert page.js("!!document.querySelector('.log.busy')")
        page.js("document.querySelector('#message .stop-button').click()")
        assert page.turns(1)[0][2].startswith("stopped")
    finally:
        other.close()


def test_retry_edit_undo_and_clear(page: Page) -> None:
    page.open(Temperature="2", Top_p="1", Top_k="0")
    page.say("hay")
    (first,) = page.turns(1)
    page.say("hum")
    before = page.turns(2)
    assert before[0] == first
    for _ in range(3):  # what is drawn may be the same once
        page.press("Retry")
        page.wait("!!document.querySelector('.log.busy')")
        after = page.turns(2)
        assert (after[0], after[1][0]) == (before[0], "hum")
        if after[1][1] != before[1][1]:
            break
    assert after[1][1] != before[1][1]
    page.press("Undo")
    assert page.turns(1) == [before[0]]
    assert page.wait("document.querySelector('#message textarea').value") == "hum"
    page.press("Edit")
    page.wait("document.activeElement.className === 'edit'")
    page.js("document.activeElement.select()")
    page.browser.send("Input.insertText", text="wool <b>wool</b>")
    page.key("Enter", 13, "\r")
    page.wait("document.querySelector('.question .text').textContent === 'wool <b>wool</b>'")
    assert page.turns(1)[0][1] != first[1]
    page.press("Clear")
    page.wait("document.querySelector('.hello') && !document.querySelector('.turn')")


def test_copy_is_the_text(page: Page) -> None:
    page.browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.say("hay <b>&amp;")
    ((question, answer, _),) = page.turns(1)
    page.press("Copy")
    page.wait("[...document.querySelectorAll('button')].some(it => it.textContent === 'Copied')")
    assert page.js("navigator.clipboard.readText()") == answer
    page.js("document.querySelector('.question .tool').click()")
    page.wait(f"navigator.clipboard.readText().then(it => it === {question!r})")


# --------------------------------------------------------------------------------------------------------- controls


def test_controls_have_their_effect(page: Page) -> None:
    likeliest, note = page.ask()
    assert "· 60 tokens" in note  # as `--max_new_tokens` says
    assert page.ask()[0] == likeliest
    assert likeliest.startswith(page.ask(Max_new_tokens="10")[0])
    drawn, _ = page.ask(Temperature="2", Top_p="1", Top_k="0", Seed="5")
    assert drawn != likeliest
    assert page.ask(Temperature="2", Top_p="1", Top_k="0", Seed="5")[0] == drawn
    assert page.ask(Temperature="2", Top_p="0.01")[0] == likeliest
    assert page.ask(Temperature="2", Top_k="1")[0] == likeliest
    assert page.ask(Temperature="2", Top_p="1", Top_k="0", Min_p="1")[0] == likeliest
    assert page.ask(Repetition_penalty="5")[0] != likeliest
    assert page.ask(System_message="wool wool")[0] != likeliest
    answer, _ = page.ask(Beams="3")
    assert page.js("seen") == [answer]


@pytest.mark.parametrize(
    ("control", "typed", "message"),
    [
        ("Temperature", "", "Temperature is empty; a number is needed"),
        ("Top_k", "1.5", "top_k 1.5: a number from 0 is needed"),
        ("Max_new_tokens", "70000", "more than the 65536 that this model takes; lower max_new_tokens to 65"),
        ("Seed", "<b>x</b>", "Seed '<b>x</b>': a whole number is needed, or nothing for a random one"),
    ],
)
def test_an_error_is_shown_as_text_and_the_message_stays(page: Page, control: str, typed: str, message: str) -> None:
    page.open(**{control: typed})
    page.say("hay")
    assert message in page.message()
    assert page.js("document.querySelector('#message textarea').value") == "hay"
    assert page.js("document.querySelectorAll('.turn').length") == 0
    page.type(control.replace("_", " "), "1")
    page.key("Enter", 13, "\r")
    page.say("")
    assert page.turns(1)[0][1]


# ------------------------------------------------------------------------------------------------------ other tabs


def test_the_form_answers_and_stops(page: Page) -> None:
    page.open(Max_new_tokens="60000")
    page.tab("Instruction")
    page.type("Instruction", "hay")
    page.type("Input", "wool")
    page.press("Submit")
    page.wait(f"{page.box('Output')}.value.split(' ').length > 20")
    page.press("Stop")
    page.wait("[...document.querySelectorAll('.note')].some(it => it.textContent.startsWith('stopped'))")
    page.type("Max new tokens", "3")
    page.press("Submit")
    page.wait("[...document.querySelectorAll('.note')].some(it => it.textContent.includes('· 3 tokens'))")


def test_base_and_adapter_are_compared(page: Page) -> None:
    page.open(Max_new_tokens="300")
    page.tab("Compare")
    page.type("Instruction", "hay")
    page.press("Compare")
    page.wait("document.querySelectorAll('.side.running').length === 2")
    page.wait("document.querySelectorAll('.side').length === 2 && !document.querySelector('.side.running')", 40)
    sides = page.js("[...document.querySelectorAll('.side')].map(it => [it.querySelector('h3').textContent,"
                    " it.querySelector('.text').textContent, it.querySelectorAll('mark').length,"
                    " it.querySelector('.note').textContent])")  # fmt: skip
    (base, base_text, base_marks, base_note), (tuned, tuned_text, tuned_marks, _) = sides
    assert (base, tuned) == ("base", "tuned")
    assert base_text != tuned_text
    assert base_marks and tuned_marks
    assert base_note.startswith("cut off at max new tokens · 300 tokens")
    shown = "it => getComputedStyle(it.querySelector('mark')).textDecorationStyle"
    assert page.js(f"[...document.querySelectorAll('.side')].map({shown})") == ["dashed", "solid"]


@pytest.mark.parametrize("tab", TABS[1:])
def test_an_example_is_answered_beside_what_was_expected(page: Page, tab: str) -> None:
    page.tab(tab)
    row = "[...document.querySelectorAll('.chooser tbody tr')].filter(it => it.checkVisibility())[0]"
    assert page.wait(f"{row}?.textContent.trim()").startswith("hay <b>wool</b><img src=")
    page.js(f"{row}.click()")
    page.wait(f"{page.box('Input')}.value === {json.dumps(EXAMPLE)}")
    page.press("Submit" if tab == "Instruction" else "Compare")
    expected = "#expected textarea" if tab == "Instruction" else ".side.expected .text"
    found = f"document.querySelector('{expected}')"
    assert page.wait(f"{found}?.value || {found}?.textContent") == EXAMPLE
    assert page.js("window.hit") is None
    page.type("Input", "wool")  # another question, to which no answer is known
    page.press("Submit" if tab == "Instruction" else "Compare")
    page.wait(f"!{found}?.checkVisibility()")


# ------------------------------------------------------------------------------------------------- safe and pleasant


def test_text_is_shown_as_text(page: Page) -> None:
    payload = "**b** $$x$$ <script>window.hit=1</script><b>b</b><img src=//elsewhere.example/x onerror=window.hit=1>"
    page.open(Temperature="2", Top_p="1", Top_k="0", Seed="1", Max_new_tokens="200")
    page.say(payload)
    ((question, answer, _),) = page.turns(1)
    assert question == payload
    assert SCRIPT in answer
    for tab in TABS[1:]:
        page.tab(tab)
        page.type("Instruction", payload)
        page.press("Submit" if tab == "Instruction" else "Compare")
    page.wait("document.querySelectorAll('.side').length === 2 && !document.querySelector('.side.running')", 40)
    assert SCRIPT in page.js("document.querySelector('.sides').textContent")
    assert page.js("window.hit") is None
    assert page.js("document.querySelectorAll('.log img, .log b, .log script, .sides img').length") == 0
    assert page.js("document.querySelectorAll('input[type=file]').length") == 0


def test_nothing_is_fetched_from_elsewhere(page: Page) -> None:
    page.js("addEventListener('securitypolicyviolation', (event) => (window.refused = event.blockedURI))")
    page.say("hay")
    page.turns(1)
    for tab in TABS[1:]:
        page.tab(tab)
        page.press("Submit" if tab == "Instruction" else "Compare")
    page.wait("document.querySelectorAll('.side').length === 2 && !document.querySelector('.side.running')", 40)
    asked = [urlsplit(url) for url in page.browser.requests]
    assert {url.hostname for url in asked if url.scheme not in ("data", "blob", "about")} == {"127.0.0.1"}
    assert page.js("window.refused") is None
    page.js("document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.2:9/x' }))")  # and if it were
    page.wait("window.refused === 'http://127.0.0.2:9/x'")


def test_a_phone_shows_everything_without_scrolling_sideways(page: Page) -> None:
    page.browser.size(390, 844, mobile=True)
    page.open(Max_new_tokens="200")
    page.say("hay " * 60 + "h" * 200)
    page.turns(1)
    for tab in TABS:
        page.tab(tab)
        if tab != "Chat":
            page.press("Submit" if tab == "Instruction" else "Compare")
            page.wait("[...document.querySelectorAll('.note')].some(it => it.offsetParent && it.textContent)")
        assert page.js("document.documentElement.scrollWidth") == 390, tab
        buttons = "[...document.querySelectorAll('button')].filter(it => it.checkVisibility() && it.offsetHeight > 1)"
        sides = "it => [it.textContent, it.getBoundingClientRect().toJSON()]"
        for words, side in page.js(f"{buttons}.map({sides})"):
            assert side["left"] >= 0 and side["right"] <= 390 and side["height"] >= 24, (tab, words, side)
    page.wait("document.querySelectorAll('.side').length === 2")
    above, below = page.js("[...document.querySelectorAll('.side')].map(it => it.getBoundingClientRect().top)")
    assert above < below


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_in_light_and_dark(page: Page, dark: bool) -> None:
    page.browser.dark(dark)
    page.open(Max_new_tokens="5")
    page.say("hay")
    page.turns(1)
    assert page.js("document.body.classList.contains('dark')") is dark
    contrast = """(() => {
      const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const rgb = (layers) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
      };
      const light = (colour) => colour.map((part) => part / 255)
        .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
        .reduce((sum, part, number) => sum + part * [0.2126, 0.7152, 0.0722][number], 0);
      const found = {};
      const shown = ".text, .note, .tool, h1, #title p, .small-print, [role=tab], .under button";
      for (const node of document.querySelectorAll(shown)) {
        if (!node.offsetParent || !node.textContent.trim()) continue;
        const layers = [];
        for (let it = node; it; it = it.parentElement) layers.unshift(getComputedStyle(it).backgroundColor);
        const back = light(rgb(layers)), front = light(rgb([...layers, getComputedStyle(node).color]));
        found[node.className + " " + node.textContent.slice(0, 20)] =
          (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
      }
      return found;
    })()"""
    found = page.js(contrast)
    assert len(found) >= 8
    assert not {what: ratio for what, ratio in found.items() if ratio < 4.5}
