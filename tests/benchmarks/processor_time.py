"""The processor time of this process and of every process below it, Ray's among them."""

from __future__ import annotations

import psutil

from tests.benchmarks.watch import Watch


class ProcessorTime(Watch):
    """User and system seconds spent within the block by this process and its descendants.

    Looked up five times a second, so that up to a fifth of a second of every process that ended is missing. What looking
    itself takes in this process is left out.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[int, float], float] | None = None
        self._last: dict[tuple[int, float], float] = {}
        self._looking = Watch.spent_s

    @property
    def seconds(self) -> float:
        spent = sum(self._last.values()) - sum((self._first or {}).values())
        return spent - (Watch.spent_s - self._looking)

    def look(self) -> None:
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._last[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue
        if self._first is None:
            self._first = dict(self._last)
