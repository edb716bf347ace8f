"""The memory of a service's processes while it is asked."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import psutil

from tests.benchmarks.watch import Watch

MIB = 2**20
_KINDS = {"replica": "ray::ServeReplica:raypipe:recommender", "haproxy": "haproxy"}


class Resident(Watch):
    """The resident memory, in MiB, of the processes below `pid` by kind, looked up every second."""

    every_s = 1.0

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.began = time.monotonic()
        self.seen: list[tuple[float, dict[str, float]]] = []

    def look(self) -> None:
        found: dict[str, float] = defaultdict(float)
        for process in psutil.Process(self.pid).children(recursive=True):
            try:
                words = " ".join(process.cmdline()[:1])
                found[next((kind for kind, name in _KINDS.items() if name in words), "other")] += (
                    process.memory_info().rss / MIB
                )
            except psutil.Error:
                continue
        self.seen.append((time.monotonic() - self.began, dict(found)))

    def growth_mib(self, *kinds: str) -> float:
        """From the second tenth of the time to the last, of these kinds together, or of all; the medians of both."""
        return round(self._median(0.9, 1.0, kinds) - self._median(0.1, 0.2, kinds), 1)

    def told(self) -> str:
        """The median of each tenth, by kind."""
        kinds = ("replica", "haproxy", "other")
        lines = [
            f"{kind}: " + " ".join(f"{self._median(part / 10, part / 10 + 0.1, (kind,)):.1f}" for part in range(10))
            for kind in kinds
        ]
        return "MiB by tenths of the time\n" + "\n".join(lines)

    def _median(self, begin: float, end: float, kinds: tuple[str, ...]) -> float:
        whole = self.seen[-1][0]
        return statistics.median(
            sum(mib for kind, mib in found.items() if not kinds or kind in kinds)
            for at, found in self.seen
            if begin * whole <= at <= end * whole
        )
