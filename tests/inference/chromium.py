"""A headless Chromium, driven through its debugging pipe, so that no driver and no further package is needed."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

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

    def size(self, width: int, height: int, mobile: bool = False, scale: float = 1) -> None:
        """Make the window this large."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    def dark(self, on: bool) -> None:
        """Say which colours the reader prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write what the tab shows as a PNG, the part below the window too if `whole`."""
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(picture))

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
