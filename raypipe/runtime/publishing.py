"""What a run commits, and how a commit that was interrupted is completed."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from raypipe.errors import UnavailableError
from raypipe.runtime.progress import say
from raypipe.storage.ledger import WHOLE, Publish, Receipt, Run
from raypipe.storage.locks import hold
from raypipe.storage.tables import Table
from raypipe.storage.workspace import Workspace

# All jobs write the rejects table, and each holds its lock only briefly, at the end. The same holds for tables that one
# job commits together. So a job waits this long for another job's commits.
_COMMITS_WAIT_S = 60.0
_POLL_S = 0.2


def bucket_parts(receipts: Iterable[Receipt], variant: str, tables: Sequence[str]) -> list[Publish]:
    """The publish of what units of user buckets staged.

    It replaces the touched buckets of `variant` in each table and appends rejects.
    """
    touched = [receipt for receipt in receipts if receipt.staged]
    buckets: list[dict[str, str | int]] = [{"variant": variant, "bucket": receipt.unit.index} for receipt in touched]
    return [
        Publish(
            table,
            "append" if table == "rejects" else "overwrite",
            [file for receipt in touched for file in receipt.staged.get(table, [])],
            [] if table == "rejects" else buckets,
        )
        for table in ("rejects", *tables)
        if any(receipt.staged.get(table) for receipt in touched)
    ]


def rows_of(parts: Iterable[Publish], rejected: int) -> dict[str, dict[str, int]]:
    """The `tables` entry of the result of a job that publishes these parts."""
    return {part.table: {"rows": sum(file.rows for file in part.files), "rejected": rejected} for part in parts}


def write_locks(job: str, scope: str, tables: Iterable[str]) -> list[str]:
    """The names of the locks that a run holds to write `tables`: the tables' own.

    A canary writes tables of its own. It holds one lock for its job and users, so that no two jobs make the same canary
    at once.
    """
    return sorted(tables) if scope == WHOLE else [f"canary-{job}-{scope[:12]}"]


def output_table(workspace: Workspace, name: str, scope: str, run_key: str) -> Table:
    """The table that a run writes: the workspace's own, or for a canary one that no job reads.

    A canary's table is below `canary/<run_key>`.
    """
    table = workspace.tables[name]
    if scope == WHOLE:
        return table
    return Table(workspace.store, table.spec, folder=f"canary/{run_key}/{name}")


def complete(workspace: Workspace, run: Run) -> dict[str, Any]:
    """Carry out a written publish intent. Commits that were made already are skipped. Returns the run's result."""
    intent = run.publish_intent()
    assert intent is not None, "only a written intent can be completed"
    parts, result = intent
    number = run.number
    versions: dict[str, int] = {}
    places: Counter[str] = Counter()
    for part in sorted(parts, key=lambda part: part.table != "rejects"):
        # One transaction replaces partitions along one column, so a table may need several transactions.
        places[part.table] += 1
        app = f"{part.table}:{run.job}" + (f":{places[part.table]}" if places[part.table] > 1 else "")
        table = output_table(workspace, part.table, run.manifest["scope"], run.run_key)
        lock = hold(workspace.store, ["rejects"] if part.table == "rejects" else [], run.job, wait_s=_COMMITS_WAIT_S)
        with lock:
            versions[part.table] = table.publish(
                part.files,
                mode=part.mode,
                app=app,
                number=number,
                replaces=part.replaces,
                metadata={"raypipe.run_key": run.run_key, "raypipe.job": run.job},
            )
    if (buckets := run.intended_buckets()) is not None:
        workspace.record_buckets(buckets)
    tables = {name: {"version": version, **result["tables"].get(name, {})} for name, version in versions.items()}
    final = {**result, "tables": tables}
    run.finish(final)
    return final


def recover(workspace: Workspace, job: str, held: set[str]) -> None:
    """Complete every publish that a killed run of any job began, so that no job reads half of it.

    `held` names the locks that this job holds already. Raises UnavailableError if a living job holds one of the other
    locks needed for longer than commits take.
    """
    for name in workspace.store.folders("ledger"):
        for run in list(workspace.ledger(name).publishing()):
            intent = run.publish_intent()
            assert intent is not None, "an intent stays as it was written"
            tables = {part.table for part in intent[0]} - {"rejects"}
            locks = set(write_locks(name, run.manifest["scope"], tables)) - held
            _complete_once_free(workspace, run, sorted(locks), f"{job} (completing {name})")


def _complete_once_free(workspace: Workspace, run: Run, locks: Sequence[str], owner: str) -> None:
    """Complete the run's publish as soon as its locks are free.

    The holder may be the run's own job, which is alive and will finish, or another job that completes the publish.
    """
    deadline = time.monotonic() + _COMMITS_WAIT_S
    while run.result() is None:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(hold(workspace.store, locks, owner))
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
            else:
                if run.result() is None:
                    say(f"{run.job}: completing the publish of run {run.run_key[:12]}, which was interrupted")
                    complete(workspace, run)
                return
        time.sleep(_POLL_S)


def settled_versions(workspace: Workspace, *tables: str) -> dict[str, int] | None:
    """The newest versions of tables at a moment when no job is between its commits, so that they belong together.

    Waits for a publish that is under way. Returns None if it does not end in time: a killed run's publish stays
    incomplete until a session completes it.
    """
    deadline = time.monotonic() + _COMMITS_WAIT_S
    while True:
        versions = {name: workspace.tables[name].version() for name in tables}
        if not _is_publishing(workspace, tables):
            # A publish may have ended after the first of these versions was read.
            if all(workspace.tables[name].version() == version for name, version in versions.items()):
                return versions
        elif time.monotonic() > deadline:
            return None
        else:
            time.sleep(_POLL_S)


def _is_publishing(workspace: Workspace, tables: Sequence[str]) -> bool:
    """Whether a run over all users that began to publish one of the tables has not ended yet."""
    for job in workspace.store.folders("ledger"):
        for run in workspace.ledger(job).publishing():
            intent = run.publish_intent()
            assert intent is not None, "an intent stays as it was written"
            if run.manifest["scope"] == WHOLE and any(part.table in tables for part in intent[0]):
                return True
    return False
