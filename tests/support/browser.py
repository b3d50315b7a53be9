"""A headless Chromium, driven over its debugging pipe: no network port, and no package beside the browser itself."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path


def find_browser():
    for name in ("chromium", "google-chrome", "chromium-browser"):
        if found := shutil.which(name):
            return found
    raise AssertionError("tests marked browser need chromium or google-chrome on PATH")


class Browser:
    """One page of a browser. `requests` and `complaints` are what it asked for and said since `open`."""

    def __init__(self, timeout_s=60.0):
        self.timeout_s = timeout_s
        self.requests, self.complaints, self._seen = [], [], set()
        self._profile = tempfile.mkdtemp(prefix="r3-browser-")
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        flags += [f"--user-data-dir={self._profile}", "--hide-scrollbars", "--disable-dev-shm-usage"]
        # The browser reads from descriptor 3 and writes to 4; a shell puts them there.
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", find_browser(), *flags, "about:blank"],
            pass_fds=(commands, answers),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, None
        pages = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == self._number, method)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    def open(self, path, *, width=1280, height=900, dark=False):
        """Show a file, in a window of that size, and wait until it is loaded."""
        self.requests.clear()
        self.complaints.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self._seen.clear()
        url = path if isinstance(path, str) else Path(path).resolve().as_uri()
        assert "errorText" not in self.call("Page.navigate", url=url)
        if "Page.loadEventFired" not in self._seen:
            self._until(lambda found: found.get("method") == "Page.loadEventFired", f"loading {url}")
        return self

    def value(self, expression):
        """What a JavaScript expression is on the page, as JSON has it."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path=None, *, whole=True):
        """PNG bytes of the whole page, or of the window."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        picture = base64.b64decode(found["data"])
        if path is not None:
            Path(path).write_bytes(picture)
        return picture

    def close(self):
        with contextlib.suppress(OSError):
            os.close(self._out)
            os.close(self._in)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _until(self, wanted, what):
        deadline = time.monotonic() + self.timeout_s
        while True:
            while b"\0" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\0")
                found = json.loads(line)
                self._note(found)
                if wanted(found):
                    return found
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"the browser did not answer within {self.timeout_s} s: {what}"
            received = os.read(self._in, 1 << 20)
            assert received, f"the browser ended: {what}"
            self._buffer += received

    def _note(self, found):
        method, params = found.get("method"), found.get("params", {})
        self._seen.add(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(" ".join(str(part.get("value")) for part in params["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
