"""The peak memory of Ray's workers."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil


class Peak:
    """The largest VmHWM, in MiB, of the Ray workers below this process, looked up five times a second."""

    mib = 0.0

    def __enter__(self) -> Peak:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "MapWorker" in process.name() or any("MapBatches" in word for word in process.cmdline()[:1]):
                        status = Path(f"/proc/{process.pid}/status").read_text()
                        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
                        self.mib = max(self.mib, peak / 1024)
                except (psutil.Error, OSError, StopIteration):
                    continue
