"""`raypipe serve` in a process of its own: real Ray Serve behind HAProxy, asked over HTTP, alone, all at once or steadily."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from raypipe.storage.store import Store
from raypipe.storage.tokens import Tokens

_START_S = 400.0


@dataclass
class Running:
    """A service in a process of its own, on ports of its own."""

    uri: str
    url: str
    secret: str
    ports: tuple[int, ...]
    process: subprocess.Popen[str]
    audit: Path

    def ask(self, route: str, body: Any = None, secret: str | None = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {secret or self.secret}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{self.url}/{route}", data, headers), timeout=60
            ) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def until(self, route: str, wanted: dict[str, Any], secret: str | None = None) -> None:
        """Wait until the answer holds these values."""
        deadline = time.monotonic() + 60
        answer: Any = None
        while time.monotonic() < deadline:
            _, answer = self.ask(route, secret=secret)
            if wanted.items() <= answer.items():
                return
            time.sleep(0.2)
        pytest.fail(f"{route} still answers {answer}")


def free_ports(count: int) -> tuple[int, ...]:
    """Below those that the system gives to whoever asks for any: a service takes its own only once Ray has taken many."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                found.add(port)
    return tuple(found)


def start(uri: str, folder: Path, *options: str) -> Running:
    ports = free_ports(5)
    environment = {
        **os.environ,
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[2]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[3]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_raylet_start_wait_time_s": "150",
    }
    command = [sys.executable, "-m", "raypipe.cli.main", "serve", "--workspace", uri, "--port", str(ports[0])]
    command += ["--metrics_port", str(ports[4])]
    command += ["--audit", str(folder / "audit"), "--watch_s", "0.2", *options]
    secret = Tokens(Store(uri)).make("tests", 10_000, 10_000)
    with (folder / "stderr").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    deadline = time.monotonic() + _START_S
    while "/v1 answers" not in (folder / "stderr").read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail((folder / "stderr").read_text()[-3000:])
        time.sleep(0.5)
    return Running(uri, f"http://127.0.0.1:{ports[0]}/v1", secret, ports, process, folder / "audit")


async def _burst(running: Running, bodies: list[dict[str, Any]], route: str) -> list[tuple[int, Any]]:
    headers = {"Authorization": f"Bearer {running.secret}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:

        async def one(body: dict[str, Any]) -> tuple[int, Any]:
            async with session.post(f"{running.url}/{route}", json=body) as answer:
                told = answer.headers.get("retry-after") if answer.status == 503 else await answer.json()
                return answer.status, told

        return await asyncio.gather(*(one(body) for body in bodies))


def burst(running: Running, bodies: list[dict[str, Any]], route: str = "recommend") -> list[tuple[int, Any]]:
    """All at the same time."""
    return asyncio.run(_burst(running, bodies, route))


@dataclass
class Load:
    """So many requests a second, sent when they are due and not when the last was answered, while the block lasts."""

    running: Running
    rate: float
    bodies: Sequence[dict[str, Any]]
    statuses: Counter[Any] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._ends = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    async def _send(self) -> None:
        headers = {"Authorization": f"Bearer {self.running.secret}"}
        connector, wait = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=wait) as session:
            started, sent = time.monotonic(), set()
            number = 0
            while not self._ends.is_set():
                await asyncio.sleep(max(0.0, started + number / self.rate - time.monotonic()))
                sent.add(asyncio.create_task(self._one(session, self.bodies[number % len(self.bodies)])))
                number += 1
            await asyncio.gather(*sent)

    async def _one(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        started = time.monotonic()
        try:
            async with session.post(f"{self.running.url}/recommend", json=body) as answer:
                told = await answer.json(content_type=None)
                self.statuses[answer.status if answer.status == 200 else (answer.status, json.dumps(told)[:200])] += 1
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self.statuses[repr(error)] += 1
        self.waits.append(time.monotonic() - started)


def processes(running: Running, name: str) -> list[psutil.Process]:
    """Those below the service whose command line begins so."""
    found = []
    for process in psutil.Process(running.process.pid).children(recursive=True):
        try:
            if "".join(process.cmdline()[:1]).startswith(name):
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(what: Callable[[], Any], seconds: float = 90.0) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def stop(running: Running) -> None:
    """As a person would."""
    if running.process.poll() is None:
        running.process.terminate()
        running.process.communicate(timeout=200)
