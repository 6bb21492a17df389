"""A page in a real browser: Chromium without a window, driven through its DevTools protocol."""

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

_SECONDS = 60  # for the browser to start, and for each of its answers
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--remote-debugging-port=0",
)  # fmt: skip
_LOOK = """(async () => {
  await Promise.all([...document.images].map(image => image.decode().catch(() => {})));
  return {
    title: document.title,
    pictures: document.images.length,
    broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt),
    scripts: document.scripts.length,
    text: document.body.innerText,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    ran: Boolean(window.injected),
  };
})()"""


@dataclass
class Seen:
    """What the browser found."""

    title: str
    pictures: int
    broken: list[str]
    scripts: int
    text: str
    wide: int
    """Pixels by which the page is wider than the screen."""
    ran: bool
    """Whether a script on the page has set window.injected."""
    complaints: list[str] = field(default_factory=list)
    """Console errors and warnings, exceptions, breaches of the page's security policy."""
    requests: list[str] = field(default_factory=list)
    """Addresses that were requested besides the page itself and its own data."""


def find_chromium() -> str | None:
    """The browser that CHROMIUM names, or the first on the path."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def look(
    browser: str, page: Path, width: int = 1200, screenshot: Path | None = None, dark: bool = False, height: int = 800
) -> Seen:
    """Open a page on a screen of `width` pixels; save a picture of the whole page to `screenshot`."""
    with ExitStack() as stack:
        profile = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        log = stack.enter_context((profile / "log").open("w+b"))
        words = [browser, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(words, stdout=log, stderr=log)
        stack.callback(process.wait, timeout=_SECONDS)
        stack.callback(process.kill)
        port = _wait_for_port(profile / "DevToolsActivePort", process)
        return asyncio.run(_look(port, page, (width, height), screenshot, dark))


def _wait_for_port(path: Path, process: "subprocess.Popen[bytes]") -> int:
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        if path.is_file() and (lines := path.read_text().split("\n"))[1:]:
            return int(lines[0])
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the browser does not start: {(path.parent / 'log').read_text(errors='replace')[-2000:]}")


class _Tab:
    """One tab, its answers and its events."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number, self.events = socket, 0, []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command; return its answer and keep the events that come before it."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._next()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    async def wait_for(self, name: str) -> None:
        """Read messages until an event of this name comes."""
        while not any(event["method"] == name for event in self.events):
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message = json.loads((await self._socket.receive(timeout=_SECONDS)).data)
        if "method" in message:
            self.events.append(message)
        return message


async def _look(port: int, page: Path, size: tuple[int, int], screenshot: Path | None, dark: bool) -> Seen:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
        async with session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tab.ask(f"{domain}.enable")
            width, height = size
            is_phone = width < 600
            await tab.ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=is_phone,
                deviceScaleFactor=2 if is_phone else 1,
            )  # fmt: skip
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await tab.ask("Emulation.setEmulatedMedia", features=[scheme])
            await tab.ask("Page.navigate", url=page.resolve().as_uri())
            await tab.wait_for("Page.loadEventFired")
            found = await tab.ask("Runtime.evaluate", expression=_LOOK, awaitPromise=True, returnByValue=True)
            if screenshot is not None:
                picture = await tab.ask("Page.captureScreenshot", captureBeyondViewport=True)
                screenshot.write_bytes(base64.b64decode(picture["data"]))
    own = (page.resolve().as_uri(), "data:")
    asked = [each["params"]["request"]["url"] for each in tab.events if each["method"] == "Network.requestWillBeSent"]
    complaints = [text for each in tab.events if (text := _complaint(each))]
    return Seen(
        **found["result"]["value"], complaints=complaints, requests=[url for url in asked if not url.startswith(own)]
    )


def _complaint(event: dict[str, Any]) -> str:
    parameters = event["params"]
    if event["method"] == "Runtime.exceptionThrown":
        return str(parameters["exceptionDetails"])
    if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
        return str(parameters["entry"]["text"])
    if event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
        return str(parameters["args"])
    return ""
