"""Requests sent when they are due, whatever became of those before: waiting for answers would hide how late they are.

What the client itself costs is measured with `AtOnce`, a server that answers every request with the same bytes.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

_GIVEN_UP_S = 30.0


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
    found = Sent()
    headers = {"Authorization": f"Bearer {secret}"}
    wait = aiohttp.ClientTimeout(total=_GIVEN_UP_S)
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=wait) as session:

        async def one(body: dict[str, Any], due: float) -> None:
            found.begun_late_s.append(time.monotonic() - due)
            try:
                async with session.post(url, json=body) as answer:
                    await answer.read()
                    status = answer.status
            except (aiohttp.ClientError, TimeoutError) as error:
                status = 0
                found.reasons[type(error).__name__] += 1
            found.statuses[status] += 1
            if status == 200:
                found.waits_s.append(time.monotonic() - due)
            elif status in {429, 503}:
                found.refused_s.append(time.monotonic() - due)

        started = time.monotonic()
        sent = set()
        for number in range(int(rate * seconds)):
            due = started + number / rate
            if (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            task = asyncio.create_task(one(bodies[number % len(bodies)], due))
            sent.add(task)
            task.add_done_callback(sent.discard)
        while sent:
            await asyncio.wait(set(sent))
    return found


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
