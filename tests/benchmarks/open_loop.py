"""Requests sent when they are due, whatever became of those before: waiting for answers would hide how late they are."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

_GIVEN_UP_S = 30.0


@dataclass(frozen=True)
class Sent:
    """What became of requests: `statuses`, 0 where there was no answer, and the seconds of those with 200."""

    statuses: Counter[int]
    waits_s: Sequence[float]

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

    def share(self, *statuses: int) -> float:
        return sum(self.statuses[status] for status in statuses) / max(1, self.statuses.total())

    def is_carried(self, late_s: float) -> bool:
        return self.share(200) >= 0.99 and self.p99_s <= late_s


def send(url: str, secret: str, bodies: Sequence[dict[str, Any]], rate: float, seconds: float) -> Sent:
    """The bodies in turn, `rate` a second for so many seconds."""
    return asyncio.run(_send(url, secret, bodies, rate, seconds))


async def _send(url: str, secret: str, bodies: Sequence[dict[str, Any]], rate: float, seconds: float) -> Sent:
    statuses: Counter[int] = Counter()
    waits: list[float] = []
    headers = {"Authorization": f"Bearer {secret}"}
    wait = aiohttp.ClientTimeout(total=_GIVEN_UP_S)
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=wait) as session:

        async def one(body: dict[str, Any], due: float) -> None:
            try:
                async with session.post(url, json=body) as answer:
                    await answer.read()
                    status = answer.status
            except (aiohttp.ClientError, TimeoutError):
                status = 0
            statuses[status] += 1
            if status == 200:
                waits.append(time.monotonic() - due)

        started = time.monotonic()
        sent = []
        for number in range(int(rate * seconds)):
            due = started + number / rate
            if (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            sent.append(asyncio.create_task(one(bodies[number % len(bodies)], due)))
        await asyncio.gather(*sent)
    return Sent(statuses, waits)
