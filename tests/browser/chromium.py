"""Chromium without a window, driven through the DevTools protocol over two pipes: no driver, no port, no dependency.

A :class:`Chromium` is one process, a :class:`Tab` a page in a profile of its own (nothing stored is shared). Calls are
synchronous; what the browser tells in between is kept. Where an answer does not come, an AssertionError says so.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
PATIENCE = 60.0  # seconds after which something that should happen is taken not to
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--force-color-profile=srgb", "--lang=en-US",
)  # fmt: skip
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "Space": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
        "ArrowRight": 39, "ArrowDown": 40}  # fmt: skip
SHIFT, CONTROL = 8, 2


def find() -> str | None:
    """The browser's path: EXITLM_CHROMIUM, else the first that is installed."""
    return os.environ.get("EXITLM_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser process. ``profile`` is an empty directory of its own."""

    def __init__(self, binary: str, profile: Path) -> None:
        to_browser, self._out = (_high(fd) for fd in os.pipe())
        self._in, from_browser = (_high(fd) for fd in os.pipe())
        log = os.open(profile / "browser.log", os.O_CREAT | os.O_WRONLY)
        self._pid = os.posix_spawn(
            binary, [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"], {**os.environ, "HOME": str(profile)},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, to_browser, 3), (os.POSIX_SPAWN_DUP2, from_browser, 4),
                (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2),
            ],
        )  # fmt: skip
        for fd in (to_browser, from_browser, log):
            os.close(fd)
        self._rest, self._calls = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            found = self._next()
            if found.get("id") == self._calls:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._in], [], [], PATIENCE)[0], "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def close(self) -> None:
        """End the process."""
        self.call("Browser.close")
        os.waitpid(self._pid, 0)
        os.close(self._in)
        os.close(self._out)


def _high(fd: int) -> int:
    """The same file under a number that the child's 3 and 4 do not overwrite, and that it does not inherit."""
    found = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return found


class Tab:
    """A page. Selectors are those of CSS; expressions are JavaScript, whose values come back as JSON."""

    def __init__(self, browser: Chromium, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self._browser = browser
        self._context = browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._forgiven: list[str] = []
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.prefer(scheme)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    # ---- what the page is shown on

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def prefer(self, scheme: str) -> None:
        """The colour scheme that the system asks for; nothing moves, so that pictures are alike."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    # ---- what a person does

    def goto(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key by its name, or a character."""
        name = " " if key == "Space" else key
        event: dict[str, Any] = {"key": name, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"Enter": "\r", "Space": " "}.get(key)
        if text is not None and not modifiers & CONTROL:
            event["text"] = text
        self.call("Input.dispatchKeyEvent", type="keyDown" if "text" in event else "rawKeyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **{k: v for k, v in event.items() if k != "text"})

    def type(self, text: str) -> None:
        """Text goes to whatever has the focus."""
        self.call("Input.insertText", text=text)

    def hover(self, selector: str, at: int = 0) -> None:
        x, y = self._middle(selector, at)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, at: int = 0) -> None:
        self.hover(selector, at)
        x, y = self._middle(selector, at)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def _middle(self, selector: str, at: int) -> tuple[float, float]:
        found = self.js(
            f"""(() => {{
                const element = document.querySelectorAll({json.dumps(selector)})[{at}];
                if (!element) return null;
                element.scrollIntoView({{ block: "nearest" }});
                const box = element.getClientRects()[0];
                return box ? [box.left + box.width / 2, box.top + box.height / 2] : null;
            }})()"""
        )
        assert found, f"nothing to point at: {selector} [{at}]"
        return found[0], found[1]

    # ---- what a person sees

    def js(self, expression: str) -> Any:
        """The value of an expression (of a promise, what it comes to)."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"].get("exception", found).get("description")
        return found["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Until an expression is true; its value."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"this does not come true: {expression}"
            time.sleep(0.02)
        return value

    def text(self, selector: str, at: int = 0) -> str:
        """What an element says."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{at}]"
        self.wait(f"{element} !== undefined")
        return self.js(f"{element}.textContent")

    def texts(self, selector: str) -> list[str]:
        return self.each(selector, "(found) => found.textContent")

    def each(self, selector: str, function: str) -> list[Any]:
        """What a function of JavaScript returns for each element."""
        return self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map({function})")

    def shot(self, path: Path) -> None:
        """A picture of what is visible, as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    # ---- what the browser says

    def _told(self, method: str) -> list[dict[str, Any]]:
        return [
            e["params"] for e in self._browser.events if e.get("sessionId") == self._session and e["method"] == method
        ]

    @property
    def requested(self) -> list[str]:
        """The address of each request."""
        return [event["request"]["url"] for event in self._told("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[str]:
        """Errors of the script, and what the policy of the page forbade; not the status of answers."""
        thrown = [str(event["exceptionDetails"]) for event in self._told("Runtime.exceptionThrown")]
        logged = [event["entry"] for event in self._told("Log.entryAdded")]
        said = thrown + [
            f"{entry['text']} ({entry['source']}, {entry.get('url')})"
            for entry in logged
            if entry["level"] == "error" and entry["source"] != "network"
        ]
        return [complaint for complaint in said if not any(part in complaint for part in self._forgiven)]

    def forgive(self, part: str) -> None:
        """Complaints that hold this text were provoked by the test."""
        self._forgiven.append(part)
