"""Draw the pictures of the page, docs/page-*.png, in a headless Chromium: python docs/screenshots.py ADAPTER.

ADAPTER is a folder that `python finetune.py --output_dir ADAPTER` made, which trains on the demo in half a minute.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "inference"))
from chromium import Browser  # noqa: E402

QUESTIONS = ["What is Ecuador famous for?", "Which word rhymes with goat?"]
WIDTH, HEIGHTS = 1080, {"chat": 760, "compare": 604}


def main(adapter: str) -> None:
    """Serve an adapter, and take a picture of a chat and one of base and adapter side by side."""
    command = [sys.executable, str(ROOT / "generate.py"), "--lora_weights", adapter, "--temperature", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert server.stderr is not None
    try:
        address = next(line.split()[2] for line in server.stderr if line.startswith("listening on "))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            browser = Browser(Path(profile))
            browser.send("Emulation.setScrollbarsHidden", hidden=True)
            browser.send("Page.navigate", url=address)
            chat(browser)
            compare(browser)
            browser.close()
    finally:
        server.kill()
        server.wait()


def chat(browser: Browser) -> None:
    """Ask some questions, and draw them with their answers."""
    browser.size(WIDTH, HEIGHTS["chat"])
    browser.wait("!!document.querySelector('.hello')")
    for number, question in enumerate(QUESTIONS, 1):
        browser.js("document.querySelector('#message textarea').focus()")
        browser.send("Input.insertText", text=question)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        browser.send("Input.dispatchKeyEvent", type="keyDown", text="\r", **enter)
        browser.wait(f"document.querySelectorAll('.turn').length === {number} && !document.querySelector('.busy')")
    browser.js("document.activeElement.blur()")
    draw(browser, "chat")


def compare(browser: Browser) -> None:
    """Let base and adapter answer an example, and draw both answers."""
    browser.size(WIDTH, HEIGHTS["compare"])
    browser.js("document.querySelector('#compare-button').click()")
    row = "[...document.querySelectorAll('.chooser tbody tr')].filter((row) => row.checkVisibility())[1]"
    browser.wait(f"!!{row}")
    browser.js(f"{row}.click()")
    browser.wait("[...document.querySelectorAll('textarea')].some((box) => box.value.startsWith('Say what'))")
    browser.js("[...document.querySelectorAll('button.primary')].find((it) => it.checkVisibility()).click()")
    browser.wait("document.querySelectorAll('.side').length === 3 && !document.querySelector('.side.running')")
    draw(browser, "compare")


def draw(browser: Browser, name: str) -> None:
    """Write what the browser shows now."""
    browser.js("new Promise((done) => setTimeout(done, 500))")
    browser.screenshot(ROOT / "docs" / f"page-{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
