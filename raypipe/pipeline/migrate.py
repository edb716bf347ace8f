"""`raypipe migrate`: a workspace of an older format becomes one that this raypipe reads and writes.

It waits for open runs, holds the lock of everything that is written, and goes on where it stopped when it was killed.
"""

from __future__ import annotations

import time

from raypipe.errors import UsageError
from raypipe.pipeline.job import cost_of
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.session import refuse_open_runs
from raypipe.storage import workspace as formats
from raypipe.storage.ledger import Usage
from raypipe.storage.locks import hold
from raypipe.storage.migration import migrate
from raypipe.storage.schemas import TABLES

JOB = "migrate"


class MigrateConfig(JobConfig):
    """Configuration of `migrate`."""


def run_migrate(config: MigrateConfig) -> JobResult:
    """Bring the workspace to this raypipe's format. Raises UsageError for an empty or a newer one, and while a run is open."""
    started = time.monotonic()
    workspace = config.open_workspace()
    found = formats.found_format(workspace.store)
    if found is None:
        raise UsageError(f"The workspace {workspace.uri} is empty.", "Check its name; a new one needs no migration.")
    if found > formats.FORMAT:
        workspace.info()  # tells which raypipe reads it
    locks = [*TABLES, "nights", "releases", *workspace.training_locks()]
    with hold(workspace.store, locks, JOB, config.lock_lease_s):
        refuse_open_runs(workspace, JOB)
        passed = migrate(workspace.store)
    say(f"{JOB}: the workspace has format {formats.FORMAT}" + (f", and had {passed[0]}" if passed else " already"))
    metrics = {"format": formats.FORMAT, "steps": len(passed)}
    return JobResult(
        JOB, "ok" if passed else "nothing_to_do", metrics=metrics, cost=cost_of(Usage(), time.monotonic() - started)
    )
