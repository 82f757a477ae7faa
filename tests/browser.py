"""A real Chromium without a window, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until
from websockets.sync.client import connect

CHROMIUM = "/usr/bin/chromium"
needs_browser = pytest.mark.skipif(
    not Path(CHROMIUM).exists(), reason=f"needs {CHROMIUM} (Debian's package chromium)"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0"),
)


NAVIGATED = "Inspected target navigated or closed"


class NavigatedError(Exception):
    """The page went elsewhere while it was asked."""


class Browser:
    """One browser with one page. Use as a context manager."""

    def __enter__(self) -> Browser:
        self._home = tempfile.mkdtemp(prefix="fgc", dir="/tmp")
        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self._home}/data", "about:blank"],
            env={**os.environ, "HOME": self._home},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        port_file = Path(self._home, "data", "DevToolsActivePort")
        wait_until(
            lambda: port_file.exists() and port_file.read_text().count("\n") == 1, "the browser"
        )
        port, path = port_file.read_text().split()
        self._socket = connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None)
        self._number = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.forget()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        self.call("Browser.close")  # it ends its many processes itself
        self._socket.close()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._socket.send(
            json.dumps(message | ({"sessionId": self._session} if self._session else {}))
        )
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._number:
                if answer.get("error", {}).get("message") == NAVIGATED:
                    raise NavigatedError
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._keep(answer)

    def _keep(self, event: dict[str, Any]) -> None:
        name, about = event["method"], event["params"]
        if name == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif name == "Network.loadingFailed":
            self.troubles.append(f"{about['type']}: {about['errorText']}")
        elif name == "Network.responseReceived" and about["response"]["status"] >= 400:
            self.troubles.append(f"{about['response']['status']} {about['response']['url']}")
        elif name == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.troubles.append(details.get("exception", {}).get("description", details["text"]))
        elif name == "Log.entryAdded" and about["entry"]["level"] in ("warning", "error"):
            self.troubles.append(about["entry"]["text"])
        elif name == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning"):
            self.troubles.append(str(about["args"]))

    def forget(self) -> None:
        """Begin to count requests and troubles (console errors, failed requests) anew."""
        self.requests: list[str] = []
        self.troubles: list[str] = []

    def open(self, address: str, ready: str = "!byId('run-view').hidden") -> None:
        """Go to an address and wait until the page shows a run, or what `ready` says."""
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && {ready}")

    def look(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true; a page that still loads may not know the names in it."""
        tried = f"(() => {{ try {{ return Boolean({script}) }} catch {{ return false }} }})()"

        def true() -> bool:
            try:
                return self.look(tried)
            except NavigatedError:  # the entrance of the monitor goes on to the page
                return False

        wait_until(true, script)

    def press(self, key: str, **more: Any) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)

    def window(self, width: int, height: int, *, dark: bool = False, calm: bool = False) -> None:
        """The size of the page's window in CSS pixels, and what its user prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        motion = "reduce" if calm else "no-preference"
        wishes = {"color-scheme": "dark" if dark else "light", "reduced-motion": motion}
        features = [{"name": f"prefers-{name}", "value": value} for name, value in wishes.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A screenshot, of the window or of all the page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


def values_of(browser: Browser, chart: str) -> dict[str, list[float | None]]:
    """Every column of a chart's table of values, as bound in the document."""
    script = """(id => { const one = charts.get(id); if (one.values.hidden) one.turn();
        const names = [...one.values.querySelectorAll("th")].map(cell => cell.textContent);
        const rows = [...one.values.querySelectorAll("tbody tr")].map(row => [...row.cells].map(
            (cell, i) => i ? cell.querySelector("data")?.value ?? null : cell.textContent));
        return [names, rows] })"""
    names, rows = browser.look(f"{script}({chart!r})")
    number = [[None if cell is None else float(cell.replace(",", "")) for cell in r] for r in rows]
    return {name: [row[i] for row in number] for i, name in enumerate(names)}
