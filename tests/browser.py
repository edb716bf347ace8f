"""A real headless Chromium, driven by its DevTools protocol: pages are loaded, typed into, clicked, read and looked at."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

_START_S = 60.0


class Browser:
    """One window; an asynchronous context manager. Raises FileNotFoundError where there is no Chromium."""

    def __init__(self, folder: Path, width: int = 1200, height: int = 1400) -> None:
        binary = shutil.which("chromium")
        if binary is None:
            raise FileNotFoundError("There is no chromium")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
        self._log = folder / "chromium.log"
        window = [f"--window-size={width},{height}", f"--user-data-dir={folder / 'profile'}", "about:blank"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen([binary, *options, *window], stdout=log, stderr=log)
        self._numbers = count(1)
        self.said: list[str] = []

    async def __aenter__(self) -> Browser:
        port = self._port()
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as pages:
            (page,) = [page for page in await pages.json() if page["type"] == "page"]
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Log"):
            await self.command(f"{domain}.enable")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._socket.close()
        await self._session.close()
        self._process.terminate()
        self._process.wait(timeout=30)

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("method") in {"Runtime.exceptionThrown", "Log.entryAdded"}:
                self.said.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def go(self, url: str) -> None:
        await self.command("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not await self.run(script):
            assert time.monotonic() < deadline, f"never: {script}; {self.said}"
            await self.command("Runtime.evaluate", expression="new Promise(r => setTimeout(r, 50))", awaitPromise=True)

    async def fill(self, selector: str, text: str) -> None:
        """As a person would: the keys arrive at whatever has the focus."""
        await self.run(f"(e => {{ e.focus(); e.select(); }})(document.querySelector({json.dumps(selector)}))")
        await self.command("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9, " ": 32}[key]
        text = "\r" if key == "Enter" else key if key == " " else ""
        for kind in ("keyDown", "keyUp"):
            await self.command(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                text=text if kind == "keyDown" else "",
            )

    async def picture(self, path: Path) -> bytes:
        found = await self.command("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))
        return path.read_bytes()

    def _port(self) -> int:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            found = re.search(r"DevTools listening on ws://127\.0\.0\.1:(\d+)/", self._log.read_text())
            if found:
                return int(found[1])
            assert self._process.poll() is None, self._log.read_text()[-1000:]
            time.sleep(0.1)
        raise TimeoutError(self._log.read_text()[-1000:])
