"""`raypipe retry-rejected`: give rejected rows another chance, now that the reason may be gone.

Log rows whose item was unknown are ingested again once the catalogue has it. Users whose summary, states, list or
explanation was rejected are unblocked: the next `summarize`, `extract`, `recommend`, `rerank` or `explain` tries them.
A row that is retried leaves `rejects`; Delta's history keeps it until `raypipe vacuum`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from raypipe.config import free
from raypipe.data.log import LogColumns, LogConfig
from raypipe.data.rejects import row_json
from raypipe.pipeline.ingest import IngestConfig, run_ingest
from raypipe.pipeline.job import cost_of
from raypipe.runtime.job import JobConfig, JobResult
from raypipe.runtime.progress import say
from raypipe.runtime.session import open_session
from raypipe.storage.fingerprint import fingerprint
from raypipe.storage.ledger import Usage
from raypipe.storage.schemas import REJECTS
from raypipe.storage.workspace import Workspace

JOB = "retry-rejected"
_UNKNOWN = "unknown_item"
_NEXT = {
    "summaries": "; run summarize",
    "hidden_states": "; run extract",
    "recommendations": "; run recommend or rerank",
    "explanations": "; run explain",
}


class RetryConfig(JobConfig):
    """Configuration of `retry-rejected`."""

    table: Literal["histories", "summaries", "hidden_states", "recommendations", "explanations"] = free(
        "summaries", "rejected for which table"
    )
    reason: str | None = free(None, "only rows rejected for this reason")


def run_retry(config: RetryConfig) -> JobResult:
    """Retry the rejected rows of one table; see the module."""
    started = time.monotonic()
    workspace = config.open_workspace()
    workspace.require_info()
    metrics: dict[str, Any] = {}
    with open_session(workspace, JOB, (), config.cluster, config.lock_lease_s):
        chosen = _rejected(workspace, config)
    if config.table == "histories":
        chosen = _now_known(workspace, chosen)
        if chosen.num_rows:
            metrics = dict(_ingest_again(config, workspace, chosen).metrics)
    if chosen.num_rows == 0:
        say(f"{JOB}: nothing rejected for {config.table} can be retried")
        return JobResult(JOB, "nothing_to_do", metrics=metrics, cost=cost_of(Usage(), time.monotonic() - started))
    version = _remove(config, workspace, chosen)
    rows = workspace.tables["rejects"].rows(version)
    say(f"{JOB}: {chosen.num_rows:,} rows left rejects" + _NEXT.get(config.table, ""))
    return JobResult(
        JOB,
        "ok",
        tables={"rejects": {"version": version, "rows": rows, "rejected": rows}},
        metrics={**metrics, "retried": chosen.num_rows},
        cost=cost_of(Usage(), time.monotonic() - started),
    )


def _rejected(workspace: Workspace, config: RetryConfig) -> pa.Table:
    table = workspace.tables["rejects"]
    rows = table.read(table.version(), REJECTS.columns.names, table=config.table)
    return rows.filter(pc.equal(rows["reason"], config.reason)) if config.reason is not None else rows


def _now_known(workspace: Workspace, rows: pa.Table) -> pa.Table:
    """Rows that were rejected for an item the catalogue has by now."""
    items = workspace.tables["items"]
    known = items.read(items.version(), ["item_id"])["item_id"].combine_chunks()
    ids = pa.array([json.loads(row).get("item_id") for row in rows["row"].to_pylist()], pa.string())
    return rows.filter(pc.and_(pc.equal(rows["reason"], _UNKNOWN), pc.is_in(ids, value_set=known)))


def _ingest_again(config: RetryConfig, workspace: Workspace, rows: pa.Table) -> JobResult:
    """Ingest the rows as a log of their own. Its checksum makes a second try after a crash a no-op."""
    events = [json.loads(row) for row in rows["row"].to_pylist()]
    weights = {f"weight {event['weight']}": float(event["weight"]) for event in events}
    lines = [row_json({**event, "event": f"weight {event['weight']}"}) for event in events]
    path = f"staging/retry/{fingerprint({'lines': lines})}.jsonl"
    workspace.store.put(path, ("\n".join(lines) + "\n").encode())
    is_time = workspace.require_info().kind == "time"
    columns = LogColumns(time="time", event="event") if is_time else LogColumns(order="time", event="event")
    log = LogConfig(
        path=workspace.store.object_uri(path),
        format="jsonl",
        columns=columns,
        time_unit="milliseconds" if is_time else "auto",
        event_weights=weights,
    )
    result = run_ingest(
        IngestConfig(**{name: getattr(config, name) for name in JobConfig.model_fields}, log=log, max_reject_rate=1.0)
    )
    workspace.store.delete([path])
    return result


def _remove(config: RetryConfig, workspace: Workspace, gone: pa.Table) -> int:
    """Rewrite the table's share of `rejects` without the rows that were retried.

    It holds the lock of `tombstones` too, so that `forget`, which holds that lock, does not rewrite them at the same
    time.
    """
    table = workspace.tables["rejects"]
    with open_session(workspace, JOB, ("rejects", "tombstones"), config.cluster, config.lock_lease_s):
        rows = table.read(table.version(), REJECTS.columns.names, table=config.table)
        stay = [not found for found in _same_rows(rows, gone)]
        number = table.published_number(f"rejects:{JOB}") + 1
        staged = []
        if any(stay):
            staged.append(
                table.stage(
                    rows.filter(pa.array(stay)), f"{JOB}-{number:08d}-{time.time_ns()}", {"table": config.table}
                )
            )
        return table.publish(
            staged, mode="overwrite", app=f"rejects:{JOB}", number=number, replaces=[{"table": config.table}]
        )


def _same_rows(rows: pa.Table, gone: pa.Table) -> Sequence[bool]:
    keys = set(zip(gone["run_key"].to_pylist(), gone["key"].to_pylist(), strict=True))
    return [pair in keys for pair in zip(rows["run_key"].to_pylist(), rows["key"].to_pylist(), strict=True)]
