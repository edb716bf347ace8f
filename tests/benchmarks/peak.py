"""The peak memory of Ray's workers."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.benchmarks.watch import Watch


class Peak(Watch):
    """The largest VmHWM, in MiB, of the Ray workers below this process, looked up five times a second."""

    mib = 0.0

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                if "MapWorker" in process.name() or any("MapBatches" in word for word in process.cmdline()[:1]):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
                    self.mib = max(self.mib, peak / 1024)
            except (psutil.Error, OSError, StopIteration):
                continue
