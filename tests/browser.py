"""A real headless browser, spoken to over its own pipe (Chrome's DevTools protocol), without any network.

    with opened() as tab:
        tab.show(page); tab.ask("document.title"); tab.requests; tab.complaints; tab.screenshot(path)

The browser runs in a network namespace of its own that has no interface up, where the rights for one are
there. What it asks for all the same is in `requests`.
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
_SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Tab:
    """One page in the browser."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest = os.fdopen(read, "rb", buffering=0), write, b""
        self._number = 0
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            told = self._message()
            if told.get("id") == self._number:
                assert "error" not in told, told
                return dict(told["result"])

    def show(self, path: Path, width: int = 1280, scheme: str = "light") -> None:
        """Opens a file and waits until it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self._events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._message()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a picture."""
        told = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(told["data"]))

    def close(self) -> None:
        """Ends the browser, which takes its own processes along."""
        self._session = None
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for."""
        sent = [e["params"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    @property
    def complaints(self) -> list[str]:
        """What the console says, and scripts that fail."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(e["params"]) for e in self._events if e["method"] in kinds]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._read.read(1 << 16)
            assert more, "the browser is gone"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        told = dict(json.loads(text))
        if "method" in told:
            self._events.append(told)
        return told


@contextlib.contextmanager
def opened() -> Iterator[Tab]:
    """A browser with one empty tab."""
    assert PROGRAM
    (to_browser, write), (read, from_browser) = _high_pipe(), _high_pipe()
    apart = ["unshare", "--net"] if _may_unshare() else []
    with tempfile.TemporaryDirectory() as profile:
        # Chrome reads its descriptor 3 and writes to 4.
        line = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        command = [*apart, "bash", "-c", line, "bash", PROGRAM, *_SWITCHES, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        tab = None
        try:
            tab = Tab(read, write)
            yield tab
        finally:
            if tab is None:
                process.terminate()
            else:
                tab.close()
            os.close(write)
            process.wait()


def _high_pipe() -> tuple[int, int]:
    """Descriptors above those that the shell line moves."""
    low = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return read, write


def _may_unshare() -> bool:
    try:
        return not subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode
    except OSError:
        return False
