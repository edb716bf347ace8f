"""`raypipe status`: show which runs are open, how far they are and what they rejected, and the tables as they stand."""

from __future__ import annotations

import collections
import contextlib
import time
from typing import Any

from raypipe.config import free
from raypipe.errors import UsageError
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import clock, say
from raypipe.runtime.publishing import write_locks
from raypipe.storage.ledger import Run, counts_of
from raypipe.storage.locks import hold
from raypipe.storage.nights import Nights
from raypipe.storage.tables import ABSENT
from raypipe.storage.workspace import Workspace


class StatusConfig(JobConfig):
    """Configuration of `status`."""

    discard: str | None = free(None, "give up the open run whose key starts so; its finished units are lost")
    watch: float | None = free(None, "look again every so many seconds, until no run is open", gt=0)


def run_status(config: StatusConfig) -> JobResult:
    """Report the workspace. With `discard`, give up one open run; with `watch`, follow the open runs."""
    workspace = config.open_workspace()
    info = workspace.require_info()
    if config.discard is not None:
        _discard(workspace, config, workspace.open_runs())
    shown = _watched(workspace, config.watch) if config.watch is not None else _shown(workspace)
    rows: dict[str, dict[str, int]] = {}
    for name, table in workspace.tables.items():
        version = table.version()
        if version != ABSENT:
            rows[name] = {"version": version, "rows": table.rows(version), "rejected": 0}
            say(f"table {name}: {rows[name]['rows']:,} rows, version {version}")
    rejects = _rejects(workspace)
    for (rejected_for, reason), count in rejects.items():
        say(f"rejected for {rejected_for}: {count:,} {reason}")
    stale = _stale(workspace)
    for variant, count in stale.items():
        say(f"{variant}: {count:,} older rows stand in for new ones")
    night = Nights(workspace.store).current()
    say(f"night in force: {night.date if night else 'none'}")
    metrics: dict[str, Any] = {
        "kind": info.kind,
        "buckets": info.buckets,
        "open_runs": shown,
        "rejects": {f"{table}/{reason}": count for (table, reason), count in rejects.items()},
        "stale": stale,
        "night": night.date if night else None,
    }
    return JobResult("status", "ok", tables=rows, metrics=metrics)


def _shown(workspace: Workspace) -> list[dict[str, Any]]:
    """The open runs. A line is printed for each."""
    found = [_describe(run) for run in workspace.open_runs()]
    for run in found:
        say(
            f"{run['job']} {run['run_key'][:12]}: {run['done']}/{run['planned']} units, {run['state']}, started {run['started']}",
            **run,
        )
    return found


def _watched(workspace: Workspace, every_s: float) -> list[dict[str, Any]]:
    """Tell of the open runs every `every_s` seconds, until none is open or the person who watches stops.

    Returns those that are open then.
    """
    before: dict[tuple[str, str], tuple[int, float]] = {}
    found: list[dict[str, Any]] = []
    with contextlib.suppress(KeyboardInterrupt):
        while found := [_describe(run) for run in workspace.open_runs()]:
            now = time.monotonic()
            for run in found:
                key = run["job"], run["run_key"]
                first, since = before.setdefault(key, (run["done"], now))
                say(_watch_line(run, run["done"] - first, now - since), **run)
            time.sleep(every_s)
        say("no run is open")
    return found


def _watch_line(run: dict[str, Any], fresh: int, seconds: float) -> str:
    """How far a run is, and how long it still takes at the pace of `fresh` units in so many seconds."""
    left = run["planned"] - run["done"]
    pace = f", {clock(left * seconds / fresh)} left" if fresh else ""
    return (
        f"{time.strftime('%H:%M:%S')} {run['job']} {run['run_key'][:12]}: {run['done']}/{run['planned']} units, "
        f"{run['rows_in']:,} rows, {run['rejected']:,} rejected, {run['state']}{pace}"
    )


def _describe(run: Run) -> dict[str, Any]:
    counts = counts_of(run.receipts().values())
    return {
        "job": run.job,
        "run_key": run.run_key,
        "state": "publishing" if run.publish_intent() is not None else "open",
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.manifest["created"])),
        "done": len(run.receipts()),
        "planned": sum(run.planned().values()),
        "rows_in": counts.rows_in,
        "rejected": counts.rejected,
    }


def _discard(workspace: Workspace, config: StatusConfig, open_runs: list[Run]) -> None:
    prefix = config.discard or ""
    found = [run for run in open_runs if run.run_key.startswith(prefix)]
    if len(found) != 1:
        keys = ", ".join(run.run_key[:12] for run in open_runs) or "none"
        raise UsageError(f"{prefix!r} names {len(found)} open runs.", f"Open runs: {keys}.")
    run = found[0]
    if run.publish_intent() is not None:
        raise UsageError(f"Run {run.run_key[:12]} began to publish.", "It can only be completed: submit its job again.")
    locks = write_locks(run.job, run.manifest["scope"], run.manifest["base"])
    with hold(workspace.store, locks, "status --discard", config.lock_lease_s):
        run.abandon("discarded by hand")
    say(f"Run {run.run_key[:12]} of {run.job} was given up.")


def _stale(workspace: Workspace) -> dict[str, int]:
    """How many users, or pairs, have older rows than they should after each job's newest run, by its variant."""
    found = {}
    for job in workspace.store.folders("ledger"):
        run = next(workspace.ledger(job).finished(), None)
        if run is not None and (count := (run.result() or {}).get("metrics", {}).get("stale")):
            found[run.manifest["facts"]["variant"]] = count
    return found


def _rejects(workspace: Workspace) -> dict[tuple[str, str], int]:
    table = workspace.tables["rejects"]
    rows = table.read(table.version(), ["table", "reason"])
    pairs = zip(rows["table"].to_pylist(), rows["reason"].to_pylist(), strict=True)
    return dict(sorted(collections.Counter(pairs).items()))
