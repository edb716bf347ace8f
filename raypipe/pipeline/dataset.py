"""`raypipe dataset synthetic`: a log and a catalogue of any size with a known answer, for demos, tests, benchmarks."""

from __future__ import annotations

import time
from pathlib import Path

from raypipe.config import free
from raypipe.data.synthetic import SyntheticConfig
from raypipe.errors import RaypipeError, UsageError
from raypipe.runtime.job import JobResult
from raypipe.runtime.progress import say


class SyntheticJobConfig(SyntheticConfig):
    """Configuration of `dataset synthetic`."""

    folder: str = free("./synthetic", "where log, items and truth are written")


def run_synthetic(config: SyntheticJobConfig) -> JobResult:
    """Write the data set; the same arguments always write the same files.

    Raises UsageError if there is no permission to write the folder, and RaypipeError if writing fails otherwise.
    """
    started = time.monotonic()
    folder = Path(config.folder)
    try:
        made = config.write(folder)
    except PermissionError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}.", "Name another --folder.") from error
    except OSError as error:
        raise RaypipeError(f"{folder} cannot be written: {error}.", "Check that the disk has room.") from error
    paths = {"log": made.log, "items": made.items, "truth": made.truth, "later": made.later_log}
    metrics = {name: str(path) for name, path in paths.items() if path is not None}
    size = sum(path.stat().st_size for path in paths.values() if path is not None)
    say(f"dataset: {config.events:,} events of {config.users:,} users on {config.items:,} items in {folder}")
    return JobResult(
        "dataset",
        "ok",
        metrics={**metrics, "bytes_written": size},
        cost={"seconds": round(time.monotonic() - started, 3)},
    )
