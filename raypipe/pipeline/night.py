"""`raypipe night`: list published nights, show one, or put an earlier one back in force."""

from __future__ import annotations

from dataclasses import asdict

from raypipe.config import free
from raypipe.errors import UsageError
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.storage.locks import hold
from raypipe.storage.nights import Nights


class NightConfig(JobConfig):
    """Configuration of `night`."""

    date: str | None = free(None, "the night to show; unset: all of them")
    restore: str | None = free(None, "put the night of this date back in force")


def run_night(config: NightConfig) -> JobResult:
    """Show nights, or put an earlier one back in force. No table is touched: readers follow the pointer."""
    workspace = config.open_workspace()
    workspace.require_info()
    nights = Nights(workspace.store)
    if config.restore is not None:
        if config.date is not None:
            raise UsageError("Both --date and --restore are given.", "Use --restore DATE alone.")
        with hold(workspace.store, ["nights"], "night", config.lock_lease_s):
            night = nights.point_to(config.restore)
        say(f"The night of {night.date} is in force.")
        return JobResult("night", "ok", metrics=asdict(night))
    if config.date is not None:
        found = nights.get(config.date)
        if found is None:
            raise UsageError(f"No night of {config.date} was published.", "`raypipe night` lists those that were.")
        return JobResult("night", "ok", metrics=asdict(found))
    current = nights.current()
    for date in nights.dates():
        say(f"{date}{'   in force' if current is not None and date == current.date else ''}")
    return JobResult("night", "ok", metrics={"nights": nights.dates(), "current": current.date if current else None})
