"""Headless Chromium for tests: open a page, click, type, take a picture.

Chromium speaks its DevTools protocol over two pipes: one JSON message each way, ended by a zero
byte. So no driver and no package is needed. https://chromedevtools.github.io/devtools-protocol
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--headless", "--disable-gpu", "--no-first-run", "--disable-extensions"]
FLAGS += ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]


class Browser:
    """One tab. `log` has the exceptions and errors of the pages."""

    def __init__(self, width=1200, height=900):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Chromium reads from its file 3 and writes to its file 4.
        read, self.out = os.pipe()
        self.inbox, write = os.pipe()
        command = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", PROGRAM, *FLAGS]
        command += ["--remote-debugging-pipe", f"--user-data-dir={self.profile.name}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(read, write), **quiet)
        os.close(read)
        os.close(write)
        self.buffer, self.number, self.session, self.log = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=20)
        os.close(self.out)
        os.close(self.inbox)
        self.profile.cleanup()

    # ---- the protocol ----
    def call(self, method, **params):
        """Send a command and wait for its answer; events that come before it go to `log`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self, timeout_s=30):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.inbox], [], [], timeout_s)
            assert ready, f"Chromium has not answered for {timeout_s} s"
            part = os.read(self.inbox, 1 << 20)
            assert part, "Chromium has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(message)
        params = message.get("params", {})
        is_error = params.get("entry", {}).get("level") == "error"
        if message.get("method") == "Runtime.exceptionThrown" or is_error:
            self.log.append(params)
        return message

    # ---- what a test does ----
    def open(self, url):
        """Go to a page and wait until it is loaded."""
        assert "errorText" not in self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script):
        """The value of an expression of JavaScript; a promise is awaited."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition, timeout_s=10):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if value := self.run(condition):
                return value
            time.sleep(0.02)
        raise AssertionError(f"after {timeout_s} s not true: {condition}")

    def click(self, selector, x=None, y=None):
        """Click into an element: its middle, or (x, y) from its upper left corner."""
        script = "(() => { const node = document.querySelector(%s); node.scrollIntoView({block: "
        script += "'center'}); const r = node.getBoundingClientRect(); return [r.x, r.y, r.width, "
        script += "r.height]; })()"
        left, top, width, height = self.run(script % json.dumps(selector))
        at = {"x": left + (width / 2 if x is None else x)}
        at["y"] = top + (height / 2 if y is None else y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def type(self, text):
        """Type a text into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key, code=0, ctrl=False):
        """Press a key: `press("ArrowRight", 39)`."""
        options = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        options["modifiers"] = 2 if ctrl else 0
        if len(key) == 1:
            options["text"] = key
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **options)

    def choose_file(self, selector, path):
        """Choose a file in an input of type file."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def save_downloads(self, folder):
        """Save files that a page offers into a folder, without asking."""
        session, self.session = self.session, None
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        self.session = session

    def downloaded(self, path, timeout_s=10):
        """The text of a file, once it is saved."""
        end = time.monotonic() + timeout_s
        while not path.exists():
            assert time.monotonic() < end, f"{path} was not saved"
            time.sleep(0.02)
        return path.read_text(encoding="utf-8")

    def resize(self, width, height, scheme="light", scale=1):
        """The size of the window, in pixels, and whether the system is light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale}
        self.call("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path):
        """Save what is seen, the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
