"""`raypipe vacuum`: delete what no kept night, release or model and no open run needs, and merge small files.

Nights are counted back from the newest; the one in force is always kept. A night that was deleted can no longer be
restored. Files of tables are deleted if neither the newest version nor that of a kept night or release names them, and
they lost their place long enough ago for readers of that version to have ended. The job refuses to run while a run is
open, because it would delete what that run staged. If a `forget` was killed before it had moved the nights to its
tables, they are moved first: otherwise the files it made for them would be deleted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raypipe.config import free
from raypipe.language.checkpoint import checkpoint_hash
from raypipe.pipeline.forget_nights import last_forgetting, move_nights
from raypipe.pipeline.job import cost_of
from raypipe.pipeline.training_folders import trainings_outside
from raypipe.runtime.job import JobConfig, JobResult, ModelCache
from raypipe.runtime.progress import say
from raypipe.runtime.session import open_session, refuse_open_runs
from raypipe.storage.evaluations import Evaluations
from raypipe.storage.ledger import Usage
from raypipe.storage.locks import hold
from raypipe.storage.models import Models
from raypipe.storage.night_runs import settle_all
from raypipe.storage.nights import Nights
from raypipe.storage.releases import Release, Releases
from raypipe.storage.retention import models_to_drop, nights_to_keep, releases_to_keep, runs_to_drop, versions_to_keep
from raypipe.storage.schemas import TABLES
from raypipe.storage.tables import StagedFile, Table
from raypipe.storage.tracking import Tracking
from raypipe.storage.workspace import Workspace

JOB = "vacuum"
_DAY_S = 86_400.0
_RUN_KEY_DIGITS = 32


class VacuumConfig(JobConfig, ModelCache):
    """Configuration of `vacuum`."""

    keep_nights: int = free(30, "newest nights that can be restored", ge=1)
    keep_releases: int = free(10, "newest releases, beside those that kept nights and aliases name", ge=1)
    keep_models: int = free(3, "newest models of each name, beside those that kept releases and models name", ge=1)
    keep_runs: int = free(30, "newest runs of each job in the ledger, beside those that made what is published", ge=1)
    keep_days: float = free(
        7.0, "days for which canaries' tables, interrupted trainings and unpublished nights are kept", ge=0
    )
    grace_hours: int = free(24, "hours for which files are kept that no kept version names", ge=0)
    compact_files: int = free(8, "files of one partition from which on they become one", ge=2)
    dry_run: bool = free(False, "count what would go, and delete nothing")


def run_vacuum(config: VacuumConfig) -> JobResult:
    """Tidy the workspace; see the module. Raises UsageError while a run is open or a training runs."""
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    tracking = config.open_tracking(workspace)
    # Every job that publishes to `rejects` locks it only for a moment, as is done here.
    tables = [name for name in TABLES if name != "rejects"]
    locks = [*tables, "nights", "releases", *workspace.training_locks()]
    with open_session(workspace, JOB, locks, config.cluster, config.lock_lease_s):
        refuse_open_runs(workspace, JOB)
        if not config.dry_run:
            move_nights(workspace, last_forgetting(workspace))
        counts = {
            "nights": _nights(workspace, config),
            **_releases_and_models(workspace, config, tracking),
            "runs": _runs(workspace, config),
            "folders": _folders(workspace, config),
            "unfinished": len(remove_unfinished(workspace, config.dry_run)),
        }
        with hold(workspace.store, ["rejects"], JOB, config.lock_lease_s):
            compacted = 0 if config.dry_run else sum(_compact(table, config) for table in workspace.tables.values())
            files = _files(workspace, config)
    metrics: dict[str, Any] = {f"{name}_removed": count for name, count in counts.items()}
    metrics |= {
        "partitions_compacted": compacted,
        "files_removed": len(files),
        "bytes_freed": sum(f.size for f in files),
    }
    would = "would go" if config.dry_run else "are gone"
    say(f"{JOB}: {', '.join(f'{count} {name}' for name, count in counts.items())} {would}")
    say(f"{JOB}: {len(files):,} files of tables, {metrics['bytes_freed'] / 2**20:,.1f} MiB, {would}")
    status = "ok" if compacted or files or any(counts.values()) else "nothing_to_do"
    return JobResult(JOB, status, metrics=metrics, cost=cost_of(Usage(), time.monotonic() - started))


def _nights(workspace: Workspace, config: VacuumConfig) -> int:
    nights = Nights(workspace.store)
    kept = {night.date for night in nights_to_keep(nights, config.keep_nights)}
    old = [date for date in nights.dates() if date not in kept]
    for date in old if not config.dry_run else ():
        nights.remove(date)
    return len(old)


def _releases_and_models(workspace: Workspace, config: VacuumConfig, tracking: Tracking) -> dict[str, int]:
    releases, models = Releases(workspace.store), Models(workspace.store)
    kept = _kept_releases(workspace, config)
    old = sorted(set(releases.hashes()) - {release.hash for release in kept})
    unnamed = models_to_drop(models, kept, config.keep_models, lambda lm: checkpoint_hash(config.fetch(workspace, lm)))
    if not config.dry_run:
        for name in old:
            releases.remove(name)
        for model in unnamed:
            tracking.unregister(model)
            models.remove(model)
            workspace.store.delete([Evaluations(workspace.store).page(model.hash)])
    return {"releases": len(old), "models": len(unnamed)}


def _kept_releases(workspace: Workspace, config: VacuumConfig) -> list[Release]:
    releases = Releases(workspace.store)
    nights = nights_to_keep(Nights(workspace.store), config.keep_nights)
    kept = releases_to_keep(releases, nights, config.keep_releases)
    return [release for release in releases.all() if release.hash in kept]


def _runs(workspace: Workspace, config: VacuumConfig) -> int:
    found = 0
    if not config.dry_run:
        settle_all(workspace.store)
    for job in workspace.store.folders("ledger"):
        ledger = workspace.ledger(job)
        old = runs_to_drop(ledger, config.keep_runs)
        found += len(old)
        for number, run_key in old if not config.dry_run else ():
            ledger.drop(number, run_key)
    return found


def _folders(workspace: Workspace, config: VacuumConfig) -> int:
    """Delete folders that nobody needs any more, and return how many there are.

    These are old tables of canaries, what was staged for trainings that nobody resumed, and what is left of nights that
    were never published. Spills of runs that are over go at once.
    """
    store, before = workspace.store, time.time() - config.keep_days * _DAY_S
    published = set(Nights(store).dates())
    old = []
    for parent in ("canary", "staging", "nights"):
        for name in store.folders(parent):
            if parent == "nights" and name in published:
                continue
            # No run is open, so that no spill is needed any more.
            is_over = parent == "staging" and len(name) == _RUN_KEY_DIGITS
            if is_over or max((entry.modified for entry in store.list(f"{parent}/{name}")), default=0.0) < before:
                old.append(f"{parent}/{name}")
    for folder in old if not config.dry_run else ():
        for place in trainings_outside(store, folder):
            say(f"{JOB}: a training that nobody resumed has files outside of the workspace; delete {place}")
        store.delete_folder(folder)
    return len(old)


def remove_unfinished(workspace: Workspace, dry_run: bool = False) -> list[Path]:
    """Delete what killed writers left half written. The caller knows that nobody writes. Returns the files."""
    files = workspace.store.unfinished()
    for path in files if not dry_run else ():
        path.unlink(missing_ok=True)
    return files


def _compact(table: Table, config: VacuumConfig) -> int:
    """Merge the files of each partition that has many, and return how many partitions these are.

    Such are the partitions that are appended to run by run.
    """
    app = f"{table.spec.name}:{JOB}"
    crowded = [
        (values, files) for values, files in table.partitions(table.version()) if len(files) >= config.compact_files
    ]
    for values, files in crowded:
        number = table.published_number(app) + 1
        rows = table.read_files(files, table.spec.columns.names)
        staged = table.stage(rows, f"{JOB}-{number:08d}-{time.time_ns()}", values)
        table.publish([staged], mode="overwrite", app=app, number=number, replaces=[values] if values else [])
    return len(crowded)


def _files(workspace: Workspace, config: VacuumConfig) -> list[StagedFile]:
    nights = nights_to_keep(Nights(workspace.store), config.keep_nights)
    releases = _kept_releases(workspace, config)
    return [
        file
        for name, table in workspace.tables.items()
        for file in remove_unneeded(table, versions_to_keep(nights, releases, name), config.grace_hours, config.dry_run)
    ]


def remove_unneeded(table: Table, keep: Iterable[int], grace_hours: int, dry_run: bool = False) -> list[StagedFile]:
    """Delete the files that no kept version names, and return them."""
    files = table.unneeded(keep, grace_hours)
    if not dry_run:
        table.remove(files)
    return files
