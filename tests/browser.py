"""Headless Chromium, driven through its DevTools protocol over a pipe: no driver, no port."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars"),
    # A container has no sandbox, and little shared memory. The pages are our own.
    *("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"),
)
PATIENCE_S = 60
# Chromium reads messages from 3 and writes them to 4.
EXEC = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'


class Browser:
    """One tab of a browser. Use it in `with`, or call `close`."""

    def __init__(self) -> None:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        assert found, "the viewer's tests need a browser: sudo apt-get install chromium"
        self._profile = TemporaryDirectory(ignore_cleanup_errors=True)
        words = ["sh", "-c", EXEC, "sh", found, f"--user-data-dir={self._profile.name}", *FLAGS]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._count, self._session = 0, ""
        self.requests: list[str] = []  # what the page asked for, itself first
        self.errors: list[str] = []  # of its scripts
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = ""
        self.call("Browser.close")
        self._process.wait()
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a message and waits for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        for answer in self._messages():
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
        raise AssertionError(f"{method}: the browser has ended")

    def _messages(self) -> Iterator[dict[str, Any]]:
        """What the browser says; events are noted on the way."""
        assert self._process.stdout
        while True:
            text = bytearray()
            while (byte := self._process.stdout.read(1)) not in (b"\0", b""):
                text += byte
            if not text:
                return
            message = json.loads(text)
            params = message.get("params", {})
            match message.get("method"):
                case "Network.requestWillBeSent":
                    self.requests.append(params["request"]["url"])
                case "Runtime.exceptionThrown":
                    self.errors.append(json.dumps(params["exceptionDetails"]))
                case "Log.entryAdded" if params["entry"]["level"] == "error":
                    self.errors.append(params["entry"]["text"])
            yield message

    def open(self, page: Path, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Opens a file, and waits until it says that it is ready."""
        self.requests.clear()
        self.errors.clear()
        self.resize(width, height, dark=dark)
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait("document.documentElement?.dataset.ready")

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """A narrow screen is a phone's, with a finger in place of a mouse."""
        phone = width < 600
        size = {"width": width, "height": height, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=2 if phone else 1)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of what it promises."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + PATIENCE_S
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}; errors: {self.errors}"
            time.sleep(0.01)

    def frames(self) -> None:
        """Waits until what was done is drawn: only then is it known what is in view."""
        frame = "await new Promise(requestAnimationFrame);"
        self.evaluate(f"(async () => {{ {2 * frame} }})()")

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def middle(self, selector: str) -> dict[str, float]:
        """The middle of an element on the screen; what is not in view is scrolled to."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        self.frames()
        return self.evaluate(
            "(b => ({x: b.x + b.width / 2, y: b.y + b.height / 2}))"
            f"({element}.getClientRects()[0])"
        )

    def hover(self, selector: str) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.middle(selector))

    def click(self, selector: str) -> None:
        at = {**self.middle(selector), "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def tap(self, selector: str) -> None:
        self.call(
            "Input.dispatchTouchEvent", type="touchStart", touchPoints=[self.middle(selector)]
        )
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def open_browser() -> Iterator[Browser]:
    browser = Browser()
    try:
        yield browser
    finally:
        browser.close()
