"""The processor time of this process and of every process below it, Ray's among them."""

from __future__ import annotations

import threading

import psutil


class ProcessorTime:
    """User and system seconds spent within the block by this process and its descendants.

    Looked up four times a second, so that up to a quarter of a second of every process that ended is missing.
    """

    seconds = 0.0

    def __enter__(self) -> ProcessorTime:
        self._spent: dict[tuple[int, float], float] = {}
        self._look()
        self._before = dict(self._spent)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.seconds = sum(self._spent.values()) - sum(self._before.values())

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self._look()

    def _look(self) -> None:
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._spent[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue
