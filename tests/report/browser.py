"""A headless Chromium for tests, driven by the Chrome DevTools Protocol through two pipes."""

import base64
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """A headless browser process."""

    def __init__(self, program: str, profile: Path) -> None:
        browser_input, own_output = os.pipe()
        own_input, browser_output = os.pipe()
        browser_ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (browser_input, browser_output)]
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-extensions",
        ]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        # The browser reads from descriptor 3 and writes to descriptor 4.
        actions = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(browser_ends, (3, 4), strict=True)]
        actions += [(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]  # type: ignore[list-item]
        self.process = os.posix_spawn(program, [program, *flags], os.environ, file_actions=actions)
        for end in (browser_input, browser_output, *browser_ends):
            os.close(end)
        self.output, self.input = os.fdopen(own_output, "wb", 0), os.fdopen(own_input, "rb", 0)
        self.num_commands, self.buffer, self.events = 0, b"", list[dict[str, Any]]()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept in `events`."""
        self.num_commands += 1
        command = {"id": self.num_commands, "method": method, "params": params}
        self.output.write(json.dumps(command | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (message := self.receive()).get("id") != self.num_commands:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def receive(self) -> dict[str, Any]:
        """Wait for the next message of the browser."""
        while b"\0" not in self.buffer:
            data = self.input.read(1 << 20)
            assert data, "the browser has ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        self.send("Browser.close")
        os.waitpid(self.process, 0)
        self.output.close()
        self.input.close()


class Tab:
    """A page that is open in the browser. `close` fails if the page has logged anything, such as an error."""

    def __init__(self, browser: Browser, file: Path, *, width: int, runs_scripts: bool = True) -> None:
        self.browser = browser
        browser.events.clear()
        self.target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.send("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        is_mobile = width < 500
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=is_mobile)
        self.send("Emulation.setScriptExecutionDisabled", value=not runs_scripts)
        self.send("Page.navigate", url=file.as_uri())
        while "Page.loadEventFired" not in [event.get("method") for event in browser.events]:
            browser.events.append(browser.receive())

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command to this page and return its result."""
        return self.browser.send(method, self.session, **params)

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def take_screenshot(self) -> np.ndarray:
        """Return what is visible as pixels (H, W, 3)."""
        data = self.send("Page.captureScreenshot")["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)

    def move_mouse(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press_key(self, key: str) -> None:
        for event_type in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=event_type, key=key, code=key)

    def close(self) -> None:
        complaints = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        logged = [event for event in self.browser.events if event["method"] in complaints]
        assert not logged, logged
        self.browser.send("Target.closeTarget", targetId=self.target)
