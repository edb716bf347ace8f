"""Requests sent when they are due, whatever became of those before: waiting for answers would hide how late they are.

What the client itself costs is measured with `AtOnce`, a server that answers every request with the same bytes.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np

_GIVEN_UP_S = 30.0
_LENGTH = re.compile(rb"(?i)content-length: *([0-9]+)")


@dataclass(frozen=True)
class Sent:
    """What became of requests: `statuses`, 0 where there was no answer and `reasons` why, the seconds of those with 200 and of
    those that were told to come back, and how late each was begun, which is the client's own doing."""

    statuses: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    waits_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    begun_late_s: list[float] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """What was neither answered nor told to come back."""
        return sum(count for status, count in self.statuses.items() if status not in {200, 429, 503})

    @property
    def p99_s(self) -> float:
        return self.quantile_s(0.99)

    def quantile_s(self, share: float) -> float:
        """From when a request was due to its answer."""
        return float(np.quantile(self.waits_s, share)) if self.waits_s else float("inf")

    @property
    def late_p99_s(self) -> float:
        return float(np.quantile(self.begun_late_s, 0.99)) if self.begun_late_s else 0.0

    @property
    def refused_p99_s(self) -> float:
        return float(np.quantile(self.refused_s, 0.99)) if self.refused_s else 0.0

    def share(self, *statuses: int) -> float:
        return sum(self.statuses[status] for status in statuses) / max(1, self.statuses.total())

    def is_carried(self, late_s: float) -> bool:
        return self.share(200) >= 0.99 and self.p99_s <= late_s


def send(url: str, secret: str, bodies: Sequence[dict[str, Any]], rate: float, seconds: float) -> Sent:
    """The bodies in turn, `rate` a second for so many seconds."""
    return asyncio.run(_send(url, secret, bodies, rate, seconds))


async def _send(url: str, secret: str, bodies: Sequence[dict[str, Any]], rate: float, seconds: float) -> Sent:
    place = urlsplit(url)
    head = f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {secret}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: "
    told = [json.dumps(body).encode() for body in bodies]
    requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in told]
    client = _Client(str(place.hostname), int(place.port or 80))
    started = time.monotonic()
    for number in range(int(rate * seconds)):
        due = started + number / rate
        if (left := due - time.monotonic()) > 0:
            await asyncio.sleep(left)
        client.ask(_Request(requests[number % len(requests)], due))
    await client.ended()
    return client.found


@dataclass
class _Request:
    data: bytes
    due: float
    tries: int = 0
    is_over: bool = False


class _Client:
    """As many connections as there are requests at a time, kept for those that come later.

    No library's: on a machine that the service shares, a request should cost its client little.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port, self.found = host, port, Sent()
        self.idle: list[_Connection] = []
        self._open = 0
        self._loop = asyncio.get_running_loop()
        self._all_over = asyncio.Event()
        self._connecting: set[asyncio.Task[None]] = set()

    def ask(self, request: _Request) -> None:
        if not request.tries:
            self._open += 1
            self._all_over.clear()
            self.found.begun_late_s.append(time.monotonic() - request.due)
            self._loop.call_later(_GIVEN_UP_S, self.over, request, 0, "TimeoutError")
        request.tries += 1
        # One that answered is used at once; of a second try the connection is a new one.
        if self.idle and request.tries == 1:
            self.idle.pop().send(request)
        else:
            task = asyncio.ensure_future(self._connect(request))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, request: _Request) -> None:
        try:
            _, connection = await self._loop.create_connection(lambda: _Connection(self), self.host, self.port)
        except OSError as error:
            self.over(request, 0, type(error).__name__)
        else:
            connection.send(request)

    def over(self, request: _Request, status: int, reason: str = "") -> None:
        if request.is_over:
            return
        request.is_over = True
        seconds = time.monotonic() - request.due
        self.found.statuses[status] += 1
        if status == 200:
            self.found.waits_s.append(seconds)
        elif status in {429, 503}:
            self.found.refused_s.append(seconds)
        elif not status:
            self.found.reasons[reason] += 1
        self._open -= 1
        if not self._open:
            self._all_over.set()

    async def ended(self) -> None:
        await self._all_over.wait()
        for connection in self.idle:
            connection.transport.close()


class _Connection(asyncio.Protocol):
    def __init__(self, client: _Client) -> None:
        self.client, self.data = client, b""
        self.transport: asyncio.Transport
        self.request: _Request | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, request: _Request) -> None:
        self.request, self.data = request, b""
        self.transport.write(request.data)

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not found or self.request is None or (length is not None and len(body) < int(length[1])):
            return
        request, self.request = self.request, None
        self.client.over(request, int(head[9:12]) if length is not None else 0, "no length")
        if length is None or b"connection: close" in head.lower():
            self.transport.close()
        else:
            self.client.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self in self.client.idle:
            self.client.idle.remove(self)
        request, self.request = self.request, None
        if request is None or request.is_over:
            return
        # A server may close a connection in the moment it is used again, before it has read of it.
        if not self.data and request.tries == 1:
            self.client.ask(request)
        else:
            self.client.over(request, 0, type(error).__name__ if error is not None else "closed")


_AT_ONCE = """
import asyncio, re, sys
BODY = b'{"items": []}'.ljust(1000)
HEAD = b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: 1000\\r\\n\\r\\n"
async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            await reader.readexactly(int(re.search(rb"(?i)content-length: (\\d+)", head)[1]))
            writer.write(HEAD + BODY)
    except asyncio.IncompleteReadError:
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


class AtOnce:
    """A server in a process of its own that reads a request and answers, and does nothing else."""

    def __enter__(self) -> str:
        self._process = subprocess.Popen([sys.executable, "-c", _AT_ONCE], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        return f"http://127.0.0.1:{int(self._process.stdout.readline())}/"

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
